"""MMDetection's FPN with plug-ins after its levels, and other 3x3 convolutions."""

from collections.abc import Sequence
from typing import Any

from mmdet.models.necks import FPN
from mmdet.registry import MODELS
from mmdet.utils import ConfigType, OptConfigType

from rfa_mmdet.models.retrofit.edits import Step, apply_edits, plan_at
from rfa_mmdet.models.retrofit.new_layers import keep_new

POSITIONS = {"after_lateral": "lateral_convs", "after_output": "fpn_convs"}


@MODELS.register_module()
class PluginFPN(FPN):
    """FPN with plug-ins after its levels and other 3x3 convolutions.

    All other parameters keep the names of mmdet's FPN, and its checkpoints warm-start the 3x3
    convolutions.

    Args:
        in_channels (list[int]): Channels of the backbone's maps, finest first.
        out_channels (int): Channels of every level.
        num_outs (int): Number of levels.
        plugins (Sequence[dict]): ``dict(cfg=CFG, levels=(0, 1), position=POSITION)``. Level 0 is
            the finest; without ``levels``, the plug-in is added to all. POSITION is 'after_lateral'
            (after the 1x1 convolution, before the top-down sum) or 'after_output' (after the 3x3
            convolution). Levels created by pooling have neither. Defaults to none.
        conv_cfg (dict | None): Config of the 3x3 convolutions, including those of extra levels; the
            1x1 convolutions stay plain. Defaults to None: plain.
        strict_start (bool | str): See Retrofit. Defaults to False.
        **kwargs: Arguments of mmdet's FPN.

    Raises:
        ValueError, TypeError: An argument is invalid.

    Example:
        >>> import torch
        >>> plugin = dict(cfg=dict(type="EMA", factor=8), levels=(0, 1), position="after_output")
        >>> neck = PluginFPN([16, 32], 64, 3, plugins=[plugin], conv_cfg=dict(type="RFAConv"))
        >>> [tuple(y.shape) for y in neck((torch.rand(1, 16, 8, 8), torch.rand(1, 32, 4, 4)))]
        [(1, 64, 8, 8), (1, 64, 4, 4), (1, 64, 2, 2)]
    """

    def __init__(
        self,
        in_channels: list[int],
        out_channels: int,
        num_outs: int,
        plugins: Sequence[ConfigType] = (),
        conv_cfg: OptConfigType = None,
        strict_start: bool | str = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, num_outs, **kwargs)
        if isinstance(plugins, (dict, str)):
            raise TypeError(f"plugins={plugins!r}: must be a list of dicts")
        steps = []
        if conv_cfg is not None:
            names = [f"fpn_convs.{level}.conv" for level in range(len(self.fpn_convs))]
            steps += plan_at(self, names, conv_cfg, "conv_cfg")
        for i, plugin in enumerate(plugins):
            steps += self._plan_plugin(i, plugin)
        keep_new(self, apply_edits(self, steps, loaded=False), strict_start)

    def _plan_plugin(self, i: int, plugin: ConfigType) -> list[Step]:
        if not isinstance(plugin, dict) or not {"cfg", "position"} <= set(plugin):
            raise TypeError(
                f"plugins[{i}]={plugin!r}: must be dict(cfg=..., position=..., levels=...)"
            )
        if set(plugin) - {"cfg", "position", "levels"}:
            raise ValueError(
                f"plugins[{i}] has the keys {sorted(plugin)}: must be cfg, position and levels"
            )
        if plugin["position"] not in POSITIONS:
            raise ValueError(
                f"plugins[{i}]: position={plugin['position']!r}: must be one of {tuple(POSITIONS)}"
            )
        convs = POSITIONS[plugin["position"]]
        count = len(getattr(self, convs))
        levels = plugin.get("levels", tuple(range(count)))
        if isinstance(levels, (int, str)):
            raise TypeError(f"plugins[{i}]: levels={levels!r}: must be a sequence of ints")
        if not levels or any(level not in range(count) for level in levels):
            raise ValueError(
                f"plugins[{i}]: levels={levels}: must be in {tuple(range(count))} for "
                f"{plugin['position']} in this FPN"
            )
        names = [f"{convs}.{level}" for level in dict.fromkeys(levels)]
        return plan_at(self, names, plugin["cfg"], f"plugins[{i}].cfg", inserts=True)
