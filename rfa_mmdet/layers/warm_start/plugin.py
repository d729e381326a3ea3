"""Let plug-ins start as in their papers, or as the identity.

A gate is between 0 and 1, so a new plug-in attenuates the features of the trained layers around it.
If the last layer of a gate is zero, the gate is constant, and the output is the input times a
constant. With ``start='identity'``, a plug-in starts there and always multiplies its output by the
inverse of that constant: it computes its paper's formula times that number.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rfa_mmdet.layers.warm_start.start import WarmStartError, matching

PluginStart = Literal["paper", "identity"]
# Key in a plug-in's metadata in a state dict, next to torch's module version: its start.
START = "rfa_mmdet_start"


class Plugin(nn.Module):
    """Base class of the plug-ins: their start and output scale.

    ``output_scale`` depends only on the config, so a checkpoint must be loaded with the ``start``
    that it was trained with. The state dict's metadata records it, and loading a plug-in's weights
    with another one raises :class:`~rfa_mmdet.layers.warm_start.start.WarmStartError`. A plain
    detector's checkpoint has no keys of plug-ins and works with both.

    Attributes:
        start (str): 'paper': initialised by torch or by a parent's ``init_cfg``. 'identity': the
            output is the input until the plug-in is trained.
        output_scale (float): Factor on the output of the paper's formula. 1 with 'paper'.
        exact (bool): Whether 'identity' is exactly the identity, rather than close to it.

    Example:
        >>> from rfa_mmdet.layers import SE
        >>> se, x = SE(32, start="identity"), torch.rand(2, 32, 5, 7)
        >>> se.output_scale, se(x).equal(x)
        (2.0, True)
    """

    # Also on the class, for whole modules pickled before these attributes existed.
    start: PluginStart = "paper"
    output_scale: float = 1.0
    exact = True

    def constant_attention(self) -> tuple[dict[str, Tensor], float]:
        """Return values that make the output the input times a constant, and that constant."""
        raise NotImplementedError

    def start_as(self, start: PluginStart) -> None:
        """Set the start; subclasses call this at the end of their constructor.

        Raises:
            ValueError: The start is unknown.
        """
        if start not in get_args(PluginStart):
            raise ValueError(f"start={start!r}: must be one of {get_args(PluginStart)}")
        self.start = start
        self._register_state_dict_hook(_note_start)
        if start == "identity":
            self.output_scale = 1 / self.constant_attention()[1]
            self._set_identity()

    def init_weights(self) -> None:
        """Reinitialise with 'identity'; MMEngine calls this after a parent's ``init_cfg``.

        With 'paper', the values from the parent's ``init_cfg`` are kept.
        """
        if self.start == "identity":
            for module in self.modules():
                reset = getattr(module, "reset_parameters", None)
                if reset is not None:
                    reset()
            self._set_identity()

    def apply(self, fn: Callable[[nn.Module], Any]) -> "Plugin":
        """Apply a function to all modules; if it initialises untrained ones, keep the identity.

        MMEngine applies a parent's ``init_cfg`` this way, but does not call :meth:`init_weights`
        where a container of torch, such as ``nn.Sequential``, is between the two.
        """
        constant = self._is_constant()
        before = [p.detach().clone() for p in self.parameters()] if constant else []
        super().apply(fn)
        if constant and not all(map(torch.equal, before, self.parameters())):
            self.init_weights()
        return self

    def is_identity(self) -> bool:
        """Return whether the layer is the identity now: it started so and has not been trained."""
        return self.exact and self._is_constant()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *args: Any
    ) -> None:
        noted = metadata.get(START)
        differs = noted in get_args(PluginStart) and noted != self.start
        if differs and matching(self, state_dict, prefix):
            raise WarmStartError(
                f"{prefix}start: the checkpoint was saved with start={noted!r}, but this "
                f"{type(self).__name__} has start={self.start!r}; pass start={noted!r}"
            )
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)

    @torch.no_grad()
    def _is_constant(self) -> bool:
        if self.start != "identity" or any(p.is_meta for p in self.parameters()):
            return False
        values = self.constant_attention()[0]
        return all(torch.equal(self.get_parameter(name), value) for name, value in values.items())

    @torch.no_grad()
    def _set_identity(self) -> None:
        for name, value in self.constant_attention()[0].items():
            self.get_parameter(name).copy_(value)

    def _zeros(self, *names: str) -> dict[str, Tensor]:
        return {name: torch.zeros_like(self.get_parameter(name)) for name in names}

    def extra_repr(self) -> str:
        """Show the start, unless it is the default."""
        if self.start == "paper":
            return ""
        return f"start={self.start!r}, output_scale={self.output_scale:g}"

    def _with_start(self, *shown: str) -> str:
        """Append the start to the arguments that a subclass shows."""
        return ", ".join(filter(None, [*shown, Plugin.extra_repr(self)]))


def _note_start(plugin: Plugin, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
    metadata[START] = plugin.start
