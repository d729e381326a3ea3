"""Warm start: a layer takes a plain convolution's place and computes what that computed.

A checkpoint of the plain model has ``weight`` (and ``bias``) where the layer stands; the layer's
own final convolution is ``conv.weight``, so the two cannot be confused. Each layer has values
under which its attention weighs everything alike, by a constant that the final weight absorbs;
the receptive-field ones also have values under which their features are the window's own
(``identity.py``), on inputs that are nowhere below ``input_floor``.

:class:`Start` is the record of what a checkpoint did. :class:`WarmStartable` is the base of the
layers: first what a layer says of itself, then what loading does with it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rfa_mmdet.layers.warm_start.published_names import PUBLISHED, rename_published


class WarmStartError(ValueError):
    """The checkpoint's convolution cannot become this layer, or must not be left out."""


class Start(NamedTuple):
    """Where a layer's values come from.

    Attributes:
        filled (frozenset[str]): The layer's own names that a checkpoint filled.
        plain (tuple[str, ...]): Of 'weight' and 'bias' of a plain convolution, those that the
            layer was made from; empty where it was not.
        refused (str): Why a plain convolution in the checkpoint was not taken; empty if it was,
            or there was none.
    """

    filled: frozenset[str] = frozenset()
    plain: tuple[str, ...] = ()
    refused: str = ""


def matching(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> frozenset[str]:
    """Return a module's own names that a state dict fills: there, and of the same shape.

    Example:
        >>> state = {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(9)}
        >>> matching(nn.Linear(3, 2), state, "a.")
        frozenset({'weight'})
    """
    own = module.state_dict()
    return frozenset(
        name
        for name, value in own.items()
        # A quantised module's state holds more than tensors.
        if isinstance(value, Tensor)
        and getattr(state_dict.get(prefix + name), "shape", None) == value.shape
    )


class WarmStartable(nn.Module):
    """Base of the layers that a plain convolution's checkpoint can start.

    Attributes:
        conv (nn.Conv2d): The final convolution, of the shape of the plain one.
        start (Start): Where the values come from.
    """

    conv: nn.Conv2d

    def __init__(self) -> None:
        super().__init__()
        self.start = Start()

    # What a layer says of itself.

    def constant_attention(self) -> tuple[dict[str, Tensor], float]:
        """Return values under which the attention weighs all alike, and by what."""
        raise NotImplementedError

    def plain_start(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """Return values under which this layer computes what a plain convolution does.

        Args:
            weight (Tensor): (out_channels, in_channels / groups, kh, kw), of the plain one.
            bias (Tensor | None): (out_channels,), of the plain one.

        Returns:
            dict[str, Tensor]: By own name; what is not named may have any value.
        """
        constants, gain = self.constant_attention()
        values = {**constants, "conv.weight": weight / gain}
        if self.conv.bias is not None:
            values["conv.bias"] = weight.new_zeros(len(weight)) if bias is None else bias
        return values

    def plain_obstacle(self) -> str:
        """Say why no values let this layer compute what a plain one does; empty if some do."""
        return ""

    @classmethod
    def published_name(cls) -> str:
        """Return the class in the bases whose published names this layer reads; '': none."""
        return next((base.__name__ for base in cls.__mro__ if base.__name__ in PUBLISHED), "")

    def _zeros(self, *names: str) -> dict[str, Tensor]:
        own = self.state_dict()
        return {name: torch.zeros_like(own[name]) for name in names}

    # What loading does with it.

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
            refused = "the plain convolution has a bias and this layer none; bias=True takes it"
        if refused:
            self.start = Start(self.start.filled, refused=refused)
            return
        plain = tuple(name for name in ("weight", "bias") if prefix + name in state_dict)
        # Not in the file's precision where the layer's is higher: a weight is scaled here.
        own = self.conv.weight.dtype
        given = {name: state_dict.pop(prefix + name) for name in plain}
        given = {name: v.to(torch.promote_types(v.dtype, own)) for name, v in given.items()}
        values = self.plain_start(given["weight"], given.get("bias"))
        # What has no value of its own keeps it: nothing is missing then.
        for name, value in {**self.state_dict(), **values}.items():
            state_dict[prefix + name] = value
        # The other values are the layer's own beginning, to be trained from there.
        filled = {f"conv.{name}" for name in plain}
        filled |= {name for name in values if name.endswith(("running_mean", "running_var"))}
        self.start = Start(frozenset(filled | (self.start.filled - values.keys())), plain)

    def _check_shape(self, state_dict: dict[str, Any], prefix: str, name: str) -> None:
        given = state_dict.get(prefix + name)
        if given is not None and given.shape != self.conv.weight.shape:
            raise WarmStartError(
                f"{prefix}{name}: the checkpoint's convolution has the shape {tuple(given.shape)}, "
                f"but the {type(self).__name__} in its place needs {tuple(self.conv.weight.shape)}"
            )
