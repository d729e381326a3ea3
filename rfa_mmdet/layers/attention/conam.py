"""ConAM: confidence attention over patches.

Paper: "ConAM: Confidence Attention Module for Convolutional Neural Networks", arXiv 2110.14369.
The abstract of its last version requests withdrawal because of a conflict of interest; this is the
mechanism as published.

Differences from the published code: map sizes need not be divisible by ``patch_size`` (patches at
the border are means over real pixels), arguments are checked when the layer is built, and softmax
and dot products are float32 under mixed precision. The parameter names are the published ones.
"""

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from rfa_mmdet.layers.arguments import boolean, check_feature_map, positive_int
from rfa_mmdet.layers.untouched import are_plain, dtype_of
from rfa_mmdet.layers.warm_start.plugin import Plugin, PluginStart
from rfa_mmdet.ops.common.scale import scaled
from rfa_mmdet.ops.conam import confidence_gate


@MODELS.register_module()
class ConAM(Plugin):
    """Confidence attention. Keeps the shape.

    Amplifies every patch by its confidence: how well its mean agrees with the mean of the whole
    map, after a shared MLP, relative to the other patches. The confidences of a map sum to 1, so
    they get small on large maps; ``scale_by_patches`` makes their mean 1.

    Args:
        in_channels (int): C of the input (B, C, H, W).
        patch_size (int): Side of a patch in pixels of the map; at most the map's smaller side.
        hidden_channels (int): Width of the shared MLP.
        scale_by_patches (bool): Whether to multiply the confidences by the number of patches (not
            in the paper). Defaults to False.
        start (str): 'paper', or 'identity' for use after trained layers: the MLP's last weight
            starts at zero and its bias above zero, so all P patches have the same confidence. With
            ``scale_by_patches``, the output is always multiplied by 1/2 (``output_scale``) and
            starts as the input. Otherwise it starts as 1 + 1 / P times the input, because P depends
            on the map. See :class:`~rfa_mmdet.layers.warm_start.plugin.Plugin`. Defaults to
            'paper'.

    Raises:
        TypeError, ValueError: An argument or the input is invalid.

    Example:
        >>> import torch
        >>> from mmcv.cnn import build_plugin_layer
        >>> cfg = dict(type="ConAM", patch_size=4, hidden_channels=16)
        >>> name, conam = build_plugin_layer(cfg, in_channels=64)
        >>> name, conam(torch.rand(2, 64, 10, 13)).shape
        ('conam', torch.Size([2, 64, 10, 13]))
    """

    _abbr_ = "conam"

    def __init__(
        self,
        in_channels: int,
        patch_size: int,
        hidden_channels: int,
        scale_by_patches: bool = False,
        start: PluginStart = "paper",
    ) -> None:
        super().__init__()
        self.in_channels = positive_int("in_channels", in_channels)
        self.patch_size = positive_int("patch_size", patch_size)
        self.hidden_channels = positive_int("hidden_channels", hidden_channels)
        self.scale_by_patches = boolean("scale_by_patches", scale_by_patches)
        self.linear1 = nn.Linear(self.in_channels, self.hidden_channels)
        self.linear2 = nn.Linear(self.hidden_channels, self.in_channels)
        self.exact = self.scale_by_patches
        self.start_as(start)

    def constant_attention(self) -> tuple[dict[str, Tensor], float]:
        """Return parameter values that give all patches the same confidence."""
        # A bias of 0 would kill the last ReLU and the dot product; with this one, the product is 1.
        bias = torch.full_like(self.linear2.bias, self.in_channels**-0.5)
        values = {**self._zeros("linear2.weight"), "linear2.bias": bias}
        return values, 2 if self.scale_by_patches else 1

    def forward(self, x: Tensor) -> Tensor:
        """Amplify every patch by its confidence.

        Args:
            x (Tensor): (B, C, H, W).

        Returns:
            Tensor: (B, C, H, W).

        Raises:
            ValueError: The patch size is larger than the map.
        """
        # Unlike x + x * gate, this allocates no extra map, and autograd saves little but the input.
        return x * scaled(1 + self.attention_map(x), self.output_scale)

    def attention_map(self, x: Tensor) -> Tensor:
        """Return the confidence at every position, e.g. for visualization.

        Args:
            x (Tensor): The layer's input, (B, C, H, W).

        Returns:
            Tensor: (B, 1, H, W), at least 0.
        """
        check_feature_map("ConAM", x, self.in_channels)
        height, width = x.shape[2:]
        if self.patch_size > min(height, width):
            raise ValueError(
                f"ConAM: patch_size={self.patch_size} is larger than the {height} x {width} map; "
                f"must be from 1 to {min(height, width)} here"
            )
        return confidence_gate(x, self.patch_size, self.scale_by_patches, self._mlp)

    def _mlp(self, local: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the MLP to the vectors of the patches, (B, P, C), and of the map, (B, C)."""
        layers = self.linear1, self.linear2
        if are_plain(nn.Linear, *layers):
            for layer in layers:
                # In the vectors' precision, even if the module was converted to half.
                weight = layer.weight.to(local.dtype)
                bias = None if layer.bias is None else layer.bias.to(local.dtype)
                local, whole = (F.linear(vector, weight, bias).relu() for vector in (local, whole))
            return local, whole
        both = torch.cat([local, whole[:, None]], dim=1)  # so each module is called once
        for layer in layers:
            both = torch.relu(layer(both.to(dtype_of(layer, both))))
        both = both.to(local.dtype)
        return both[:, :-1], both[:, -1]

    def extra_repr(self) -> str:
        """Show the arguments that the submodules do not."""
        return self._with_start(
            f"patch_size={self.patch_size}, scale_by_patches={self.scale_by_patches}"
        )
