"""Where a plug-in starts: as its paper does, or as the identity.

A gate is between 0 and 1, so a new plug-in weakens what trained layers around it compute. Where the
last layer of a gate is zero, the gate is one constant, and so is its output over its input. With
``start='identity'`` a plug-in begins there and multiplies its output by the inverse of that
constant, always: what it computes is its paper's formula times that number.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

PluginStart = Literal["paper", "identity"]


class Plugin(nn.Module):
    """Base of the plug-ins: where they start, and what their output is multiplied by.

    ``output_scale`` follows from the config alone, and no checkpoint holds it: test a checkpoint,
    and train on from one, with the ``start`` that it was trained with. A plain detector's
    checkpoint has none of a plug-in's keys, and starts either.

    Attributes:
        start (str): 'paper': as torch initialises, or a parent's ``init_cfg``. 'identity': the
            output is the input until the plug-in is trained.
        output_scale (float): What the output of the paper's formula is multiplied by. 1 with
            'paper'.
        exact (bool): Whether 'identity' is the identity, and not only near it.

    Example:
        >>> from rfa_mmdet.layers import SE
        >>> se, x = SE(32, start="identity"), torch.rand(2, 32, 5, 7)
        >>> se.output_scale, se(x).equal(x)
        (2.0, True)
    """

    # On the class too, for whole modules that were pickled before there was a choice.
    start: PluginStart = "paper"
    output_scale: float = 1.0
    exact = True

    def constant_attention(self) -> tuple[dict[str, Tensor], float]:
        """Return values under which the output is the input times a constant, and that constant."""
        raise NotImplementedError

    def start_as(self, start: PluginStart) -> None:
        """Take the start that was asked for; to be called when the layer is built.

        Raises:
            ValueError: There is no such start.
        """
        if start not in get_args(PluginStart):
            raise ValueError(f"start={start!r}: must be one of {get_args(PluginStart)}")
        self.start = start
        if start == "identity":
            self.output_scale = 1 / self.constant_attention()[1]
            self._set_identity()

    def init_weights(self) -> None:
        """Begin anew with 'identity'; MMEngine calls this behind a parent's ``init_cfg``.

        With 'paper', what the parent's ``init_cfg`` made of the layer stays.
        """
        if self.start == "identity":
            for module in self.modules():
                reset = getattr(module, "reset_parameters", None)
                if reset is not None:
                    reset()
            self._set_identity()

    @torch.no_grad()
    def is_identity(self) -> bool:
        """Whether the layer is the identity now: it starts so, and nothing has moved it."""
        if self.start != "identity" or not self.exact:
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
        """Return what a subclass shows of its arguments, and the start."""
        return ", ".join(filter(None, [*shown, Plugin.extra_repr(self)]))
