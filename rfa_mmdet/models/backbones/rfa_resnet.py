"""MMDetection's ResNet with another convolution in chosen stages, and plug-ins for every depth.

As in the paper (arXiv 2304.03198), it replaces the first 3x3 convolution of a BasicBlock. A
Bottleneck only has one, which MMDetection also replaces by deformable convolutions.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch.utils.checkpoint as cp
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from mmdet.registry import MODELS
from mmdet.utils import ConfigType, OptConfigType
from torch import Tensor, nn

from rfa_mmdet.models.retrofit.edits import apply_edits, plan_at
from rfa_mmdet.models.retrofit.new_layers import keep_new


class PluginBasicBlock(BasicBlock):
    """MMDetection's BasicBlock with support for plug-ins.

    Args:
        inplanes (int): Channels of the input.
        planes (int): Channels of the output.
        plugins (list[dict] | None): As in MMDetection's Bottleneck; 'position' is 'after_conv1'
            (after the activation) or 'after_conv2' (after the norm). Defaults to None.
        **kwargs: Arguments of MMDetection's BasicBlock.

    Raises:
        ValueError: A plug-in's position is invalid.

    Example:
        >>> import torch
        >>> plugin = dict(cfg=dict(type="EMA", factor=8), position="after_conv2")
        >>> PluginBasicBlock(64, 64, plugins=[plugin])(torch.rand(1, 64, 8, 8)).shape
        torch.Size([1, 64, 8, 8])
    """

    positions = ("after_conv1", "after_conv2")
    # These methods of Bottleneck build and run a list of plug-ins, independently of the rest of it.
    make_block_plugins = Bottleneck.make_block_plugins
    forward_plugin = Bottleneck.forward_plugin

    def __init__(
        self, inplanes: int, planes: int, plugins: list[ConfigType] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(inplanes, planes, **kwargs)
        for plugin in plugins or []:
            _check_position(plugin, self.positions)
        for position in self.positions:
            cfgs = [plugin["cfg"] for plugin in plugins or [] if plugin["position"] == position]
            setattr(self, f"{position}_plugin_names", self.make_block_plugins(planes, cfgs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inplanes, H, W) to (B, planes, h, w)."""

        def residual(x: Tensor) -> Tensor:
            out = self.relu(self.norm1(self.conv1(x)))
            out = self.forward_plugin(out, self.after_conv1_plugin_names)
            out = self.norm2(self.conv2(out))
            out = self.forward_plugin(out, self.after_conv2_plugin_names)
            identity = x if self.downsample is None else self.downsample(x)
            total: Tensor = out + identity
            return total

        recompute = self.with_cp and x.requires_grad
        out = cp.checkpoint(residual, x, use_reentrant=False) if recompute else residual(x)
        y: Tensor = self.relu(out)
        return y


def _check_position(plugin: ConfigType, positions: tuple[str, ...]) -> None:
    if plugin.get("position") not in positions:
        raise ValueError(
            f"plugins: position={plugin.get('position')!r} of {plugin.get('cfg')}: "
            f"must be one of {positions} at this depth"
        )


@MODELS.register_module()
class RFAResNet(ResNet):
    """MMDetection's ResNet with ``rfa`` instead of the 3x3 convolutions of chosen stages.

    All other parameters keep the names of mmdet's ResNet, and its checkpoints warm-start the new
    convolutions. New layers are trained even in ``frozen_stages``. ``norm_eval`` and frozen stages
    only fix those of their norms that got statistics from a checkpoint or the warm start.

    Args:
        depth (int): 18, 34, 50, 101 or 152.
        rfa (dict | None): Config of the convolution, e.g. ``dict(type='RFAConv')``. Channels,
            stride and dilation come from the replaced convolution; no bias unless set here.
            Defaults to None.
        stage_with_rfa (Sequence[bool] | None): Which stages to change. Defaults to None: all.
        plugins (list[dict] | None): As in mmdet's ResNet, and also for depth 18 and 34, at
            'after_conv1' and 'after_conv2'. This package's plug-ins with ``start='identity'`` do
            not change the outputs of pretrained weights. Defaults to None.
        strict_start (bool | str): See Retrofit. Defaults to False.
        **kwargs: Arguments of mmdet's ResNet.

    Raises:
        ValueError: An argument is invalid.

    Example:
        >>> import torch
        >>> net = RFAResNet(18, rfa=dict(type="RFAConv"), stage_with_rfa=(0, 1, 1, 1))
        >>> [tuple(y.shape) for y in net(torch.rand(1, 3, 64, 64))]
        [(1, 64, 16, 16), (1, 128, 8, 8), (1, 256, 4, 4), (1, 512, 2, 2)]
    """

    arch_settings: ClassVar[dict[int, Any]] = {
        depth: (PluginBasicBlock if block is BasicBlock else block, blocks)
        for depth, (block, blocks) in ResNet.arch_settings.items()
    }

    def __init__(
        self,
        depth: int,
        rfa: OptConfigType = None,
        stage_with_rfa: Sequence[bool] | None = None,
        plugins: list[ConfigType] | None = None,
        strict_start: bool | str = False,
        **kwargs: Any,
    ) -> None:
        if depth not in self.arch_settings:
            raise ValueError(f"depth={depth!r}: must be one of {tuple(self.arch_settings)}")
        num_stages = kwargs.get("num_stages", 4)
        if rfa is None and stage_with_rfa is not None:
            raise ValueError(f"stage_with_rfa={stage_with_rfa}: needs rfa, which is None")
        if stage_with_rfa is None:
            stage_with_rfa = (rfa is not None,) * num_stages
        if (
            not isinstance(stage_with_rfa, Sequence)
            or len(stage_with_rfa) != num_stages
            or any(replaced not in (False, True) for replaced in stage_with_rfa)
        ):
            raise ValueError(
                f"stage_with_rfa={stage_with_rfa!r}: must be one bool for each of the "
                f"num_stages={num_stages} stages"
            )
        for plugin in plugins or ():
            if not isinstance(plugin, dict) or plugin.keys() - {"cfg", "stages", "position"}:
                raise ValueError(
                    f"plugins={plugins}: must be a list of dicts with the keys cfg, position and, "
                    "optionally, stages"
                )
        dcn = kwargs.get("dcn")
        if dcn is not None and (rfa is not None or depth < 50):
            raise ValueError(
                f"dcn={dcn}: replaces the same convolutions as rfa, and needs Bottlenecks "
                f"(depth={depth}); use rfa, which accepts any registered convolution"
            )
        self.rfa = rfa
        self.stage_with_rfa = tuple(map(bool, stage_with_rfa))
        self._zero_last_norm = kwargs.get("zero_init_residual", True) and not (
            kwargs.get("init_cfg") or kwargs.get("pretrained")
        )
        # Freeze at the end, when the new layers are known.
        frozen_stages = kwargs.pop("frozen_stages", -1)
        super().__init__(depth, plugins=plugins, **kwargs)
        self.frozen_stages = frozen_stages
        new = self._insert_rfa() | self._plugins()
        with keep_new(self, new, strict_start).kept(self.training):
            self._freeze_stages()

    def _insert_rfa(self) -> dict[str, nn.Module]:
        if self.rfa is None:
            return {}
        conv = "conv2" if issubclass(self.block, Bottleneck) else "conv1"
        names = [
            f"{layer}.{i}.{conv}"
            for layer, replaced in zip(self.res_layers, self.stage_with_rfa, strict=True)
            if replaced
            for i in range(len(getattr(self, layer)))
        ]
        return apply_edits(self, plan_at(self, names, self.rfa, "rfa"), loaded=False)

    def _plugins(self) -> dict[str, nn.Module]:
        return {
            f"{name}.{plugin}": getattr(block, plugin)
            for name, block in self.named_modules()
            if isinstance(block, (PluginBasicBlock, Bottleneck))
            for position in (1, 2, 3)
            for plugin in getattr(block, f"after_conv{position}_plugin_names", ())
        }

    def make_stage_plugins(self, plugins: list[ConfigType], stage_idx: int) -> list[ConfigType]:
        """Return the plug-ins of a stage, validated with clear errors first."""
        positions = getattr(self.block, "positions", ("after_conv1", "after_conv2", "after_conv3"))
        for plugin in plugins:
            _check_position(plugin, positions)
            stages = plugin.get("stages")
            if stages is not None and len(stages) != self.num_stages:
                raise ValueError(
                    f"plugins: stages={stages} of {plugin.get('cfg')}: must have "
                    f"num_stages={self.num_stages} entries"
                )
        chosen: list[ConfigType] = super().make_stage_plugins(plugins, stage_idx)
        return chosen

    def make_res_layer(
        self, block: type, init_cfg: OptConfigType = None, **kwargs: Any
    ) -> nn.Module:
        """Build a stage; MMDetection's ``zero_init_residual`` only supports its own BasicBlock."""
        if block is PluginBasicBlock and self._zero_last_norm:
            init_cfg = dict(type="Constant", val=0, override=dict(name="norm2"))
        stage: nn.Module = super().make_res_layer(block=block, init_cfg=init_cfg, **kwargs)
        return stage
