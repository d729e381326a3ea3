"""Warm start: a layer that replaces a plain convolution starts with the same outputs.

A checkpoint of the plain model has ``weight`` (and ``bias``) at the layer's place; the layer's own
final convolution is ``conv.weight``, so the two cannot be confused. Every layer has parameter
values that make its attention constant, and the final weight absorbs that constant. The
receptive-field layers also have values that make their features the window's own values
(``identity.py``), for inputs that are never below ``input_floor``.

:class:`Start` records what a checkpoint set. :class:`WarmStartable` is the base class of the
layers: first what a layer defines, then how loading uses it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rfa_mmdet.layers.warm_start.published_names import PUBLISHED, rename_published


class WarmStartError(ValueError):
    """The checkpoint does not fit a layer's start, or has weights that must not be dropped."""


class Start(NamedTuple):
    """Where a layer's values come from.

    Attributes:
        filled (frozenset[str]): Names of the layer's values set by a checkpoint.
        plain (tuple[str, ...]): Which of the plain convolution's 'weight' and 'bias' started the
            layer; empty without a warm start.
        refused (str): Why a plain convolution in the checkpoint was not used; empty if it was
            used, or there was none.
        name (str): Name of the layer in the checkpoint that warm-started it.
    """

    filled: frozenset[str] = frozenset()
    plain: tuple[str, ...] = ()
    refused: str = ""
    name: str = ""


def matching(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> frozenset[str]:
    """Return a module's own names that a state dict contains with the same shape.

    Example:
        >>> state = {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(9)}
        >>> matching(nn.Linear(3, 2), state, "a.")
        frozenset({'weight'})
    """
    own = module.state_dict()
    return frozenset(
        name
        for name, value in own.items()
        # A quantised module's state contains more than tensors.
        if isinstance(value, Tensor)
        and getattr(state_dict.get(prefix + name), "shape", None) == value.shape
    )


class WarmStartable(nn.Module):
    """Base class of layers that can start from a plain convolution's checkpoint.

    Attributes:
        conv (nn.Conv2d): The final convolution, with the shape of the plain one.
        start (Start): Where the values come from.
    """

    conv: nn.Conv2d

    def __init__(self) -> None:
        super().__init__()
        self.start = Start()

    # Defined by the layers.

    def constant_attention(self) -> tuple[dict[str, Tensor], float]:
        """Return values that make the attention constant, and that constant."""
        raise NotImplementedError

    def plain_start(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """Return values that make this layer equal to a plain convolution.

        Args:
            weight (Tensor): Its weight, (out_channels, in_channels / groups, kh, kw).
            bias (Tensor | None): Its bias, (out_channels,).

        Returns:
            dict[str, Tensor]: Values by name; all others are arbitrary.
        """
        constants, gain = self.constant_attention()
        values = {**constants, "conv.weight": weight / gain}
        if self.conv.bias is not None:
            values["conv.bias"] = weight.new_zeros(len(weight)) if bias is None else bias
        return values

    def plain_obstacle(self) -> str:
        """Return why this layer cannot equal a plain convolution; empty if it can."""
        return ""

    @classmethod
    def published_name(cls) -> str:
        """Return the base class whose published names this layer loads, or ''."""
        return next((base.__name__ for base in cls.__mro__ if base.__name__ in PUBLISHED), "")

    def _zeros(self, *names: str) -> dict[str, Tensor]:
        own = self.state_dict()
        return {name: torch.zeros_like(own[name]) for name in names}

    # Used while loading.

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rename_published(self.published_name(), state_dict, prefix)
        if prefix + "weight" in state_dict and prefix + "conv.weight" not in state_dict:
            self._start_from_plain(state_dict, prefix)
        else:
            self._check_shape(state_dict, prefix, "conv.weight")
            found = matching(self, state_dict, prefix)
            if found:
                self.start = Start(filled=self.start.filled | found)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _start_from_plain(self, state_dict: dict[str, Any], prefix: str) -> None:
        self._check_shape(state_dict, prefix, "weight")
        refused = self.plain_obstacle()
        if not refused and prefix + "bias" in state_dict and self.conv.bias is None:
            refused = "the plain convolution has a bias, but this layer has none; use bias=True"
        if refused:
            self.start = Start(self.start.filled, refused=refused)
            return
        plain = tuple(name for name in ("weight", "bias") if prefix + name in state_dict)
        # In the layer's precision if it is higher than the file's, since the weight gets scaled.
        own = self.conv.weight.dtype
        given = {name: state_dict.pop(prefix + name) for name in plain}
        given = {name: v.to(torch.promote_types(v.dtype, own)) for name, v in given.items()}
        values = self.plain_start(given["weight"], given.get("bias"))
        # All other values keep their own, so nothing is reported as missing.
        for name, value in {**self.state_dict(), **values}.items():
            # A trained plug-in that was inserted here keeps its values.
            if name in values or prefix + name not in state_dict:
                state_dict[prefix + name] = value
        # The other values are the layer's own initial ones.
        filled = {f"conv.{name}" for name in plain}
        filled |= {name for name in values if name.endswith(("running_mean", "running_var"))}
        kept = self.start.filled - values.keys()
        self.start = Start(frozenset(filled | kept), plain, name=prefix[:-1])

    def _check_shape(self, state_dict: dict[str, Any], prefix: str, name: str) -> None:
        given = state_dict.get(prefix + name)
        if given is not None and given.shape != self.conv.weight.shape:
            raise WarmStartError(
                f"{prefix}{name}: the checkpoint's convolution has shape {tuple(given.shape)}, but "
                f"the {type(self).__name__} that replaces it needs {tuple(self.conv.weight.shape)}"
            )
