"""MMDetection's ResNet with another convolution in chosen stages, and plug-ins at every depth.

The place of the convolution is the paper's (arXiv 2304.03198): the first 3x3 of a BasicBlock. A
Bottleneck has one 3x3, which is where MMDetection puts deformable convolutions too.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch.utils.checkpoint as cp
from mmcv.cnn import build_conv_layer
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from mmdet.registry import MODELS
from torch import Tensor, nn


class PluginBasicBlock(BasicBlock):
    """MMDetection's BasicBlock, which refuses plug-ins, with plug-ins.

    Args:
        inplanes (int): Channels of the input.
        planes (int): Channels of the output.
        plugins (list[dict] | None): As in MMDetection's Bottleneck; 'position' is 'after_conv1' or
            'after_conv2', after the norm and, behind conv1, the activation.
        **kwargs: As of MMDetection's BasicBlock.

    Raises:
        ValueError: A plug-in's position is none of the two.

    Example:
        >>> import torch
        >>> plugin = dict(cfg=dict(type="EMA", factor=8), position="after_conv2")
        >>> PluginBasicBlock(64, 64, plugins=[plugin])(torch.rand(1, 64, 8, 8)).shape
        torch.Size([1, 64, 8, 8])
    """

    positions = ("after_conv1", "after_conv2")
    # The two methods of Bottleneck that build and run a list of plug-ins know nothing of the rest
    # of a Bottleneck.
    make_block_plugins = Bottleneck.make_block_plugins
    forward_plugin = Bottleneck.forward_plugin

    def __init__(
        self, inplanes: int, planes: int, plugins: list[dict] | None = None, **kwargs
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
            return out + identity

        if self.with_cp and x.requires_grad:
            return self.relu(cp.checkpoint(residual, x, use_reentrant=False))
        return self.relu(residual(x))


def _check_position(plugin: dict, positions: tuple[str, ...]) -> None:
    if plugin.get("position") not in positions:
        raise ValueError(
            f"plugins: position={plugin.get('position')!r} of {plugin.get('cfg')}: "
            f"the blocks of this depth have {positions}"
        )


@MODELS.register_module()
class RFAResNet(ResNet):
    """MMDetection's ResNet with ``rfa`` in place of 3x3 convolutions, stage by stage.

    Names, and so checkpoint keys, outside the replaced convolutions are those of mmdet's ResNet.
    ``frozen_stages`` and ``norm_eval`` hold for what a ResNet checkpoint fills. The replaced
    convolutions and the plug-ins are new: they are trained, and their norms use batch statistics,
    in every stage.

    Args:
        depth (int): 18, 34, 50, 101 or 152.
        rfa (dict | None): Config of the convolution, such as ``dict(type='RFAConv')``; channels,
            stride and dilation come from the convolution replaced; bias is off unless given here.
        stage_with_rfa (Sequence[bool] | None): For each stage whether it is replaced there. None:
            in all of them.
        plugins (list[dict] | None): As of mmdet's ResNet, and at depth 18 and 34 too, at
            'after_conv1' and 'after_conv2'.
        **kwargs: As of mmdet's ResNet.

    Raises:
        ValueError: An argument is not as above.

    Example:
        >>> import torch
        >>> net = RFAResNet(18, rfa=dict(type="RFAConv"), stage_with_rfa=(0, 1, 1, 1))
        >>> [tuple(y.shape) for y in net(torch.rand(1, 3, 64, 64))]
        [(1, 64, 16, 16), (1, 128, 8, 8), (1, 256, 4, 4), (1, 512, 2, 2)]
    """

    arch_settings: ClassVar[dict] = {
        depth: (PluginBasicBlock if block is BasicBlock else block, blocks)
        for depth, (block, blocks) in ResNet.arch_settings.items()
    }

    def __init__(
        self,
        depth: int,
        rfa: dict | None = None,
        stage_with_rfa: Sequence[bool] | None = None,
        plugins: list[dict] | None = None,
        **kwargs,
    ) -> None:
        if depth not in self.arch_settings:
            raise ValueError(f"depth={depth!r}: must be one of {tuple(self.arch_settings)}")
        num_stages = kwargs.get("num_stages", 4)
        if rfa is None and stage_with_rfa is not None:
            raise ValueError(f"stage_with_rfa={stage_with_rfa} without rfa: nothing to put there")
        if stage_with_rfa is None:
            stage_with_rfa = (rfa is not None,) * num_stages
        if len(stage_with_rfa) != num_stages:
            raise ValueError(
                f"stage_with_rfa={stage_with_rfa}: must have num_stages={num_stages} entries"
            )
        dcn = kwargs.get("dcn")
        if dcn is not None and (rfa is not None or depth < 50):
            raise ValueError(
                f"dcn={dcn}: stands in the same place as rfa, and in a Bottleneck only "
                f"(depth={depth}); any registered convolution can be given as rfa"
            )
        self.rfa = rfa
        self.stage_with_rfa = tuple(map(bool, stage_with_rfa))
        self._zero_last_norm = kwargs.get("zero_init_residual", True) and not (
            kwargs.get("init_cfg") or kwargs.get("pretrained")
        )
        super().__init__(depth, plugins=plugins, **kwargs)
        for layer_name, replaced in zip(self.res_layers, self.stage_with_rfa, strict=True):
            if replaced:
                for block in getattr(self, layer_name):
                    setattr(block, self._conv_name, self._like(getattr(block, self._conv_name)))

    @property
    def _conv_name(self) -> str:
        return "conv2" if issubclass(self.block, Bottleneck) else "conv1"

    def _like(self, conv: nn.Conv2d) -> nn.Module:
        return build_conv_layer(
            {"bias": False, **self.rfa},
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
        )

    def new_layers(self) -> Iterator[nn.Module]:
        """Yield the replaced convolutions and the plug-ins: what no ResNet checkpoint fills."""
        for layer_name, replaced in zip(self.res_layers, self.stage_with_rfa, strict=True):
            for block in getattr(self, layer_name):
                if replaced:
                    yield getattr(block, self._conv_name)
                for position in (1, 2, 3):
                    for name in getattr(block, f"after_conv{position}_plugin_names", ()):
                        yield getattr(block, name)

    def make_stage_plugins(self, plugins: list[dict], stage_idx: int) -> list[dict]:
        """Return the plug-ins of a stage, checked in words before MMDetection asserts."""
        positions = getattr(self.block, "positions", ("after_conv1", "after_conv2", "after_conv3"))
        for plugin in plugins:
            _check_position(plugin, positions)
            stages = plugin.get("stages")
            if stages is not None and len(stages) != self.num_stages:
                raise ValueError(
                    f"plugins: stages={stages} of {plugin.get('cfg')}: must have "
                    f"num_stages={self.num_stages} entries"
                )
        return super().make_stage_plugins(plugins, stage_idx)

    def make_res_layer(self, block: type, init_cfg: dict | None = None, **kwargs) -> nn.Module:
        """Build a stage; MMDetection's ``zero_init_residual`` knows only its own BasicBlock."""
        if block is PluginBasicBlock and self._zero_last_norm:
            init_cfg = dict(type="Constant", val=0, override=dict(name="norm2"))
        return super().make_res_layer(block=block, init_cfg=init_cfg, **kwargs)

    def _freeze_stages(self) -> None:
        # New layers stay as they are: trained, unless their own norm_cfg or the user froze them.
        new = [p for layer in self.new_layers() for p in layer.parameters()]
        trained = [p.requires_grad for p in new]
        super()._freeze_stages()
        for parameter, flag in zip(new, trained, strict=True):
            parameter.requires_grad_(flag)

    def train(self, mode: bool = True) -> "RFAResNet":
        """Switch the mode; frozen and ``norm_eval`` parts stay as they are, new layers follow."""
        super().train(mode)
        for layer in self.new_layers():
            layer.train(mode)
        return self
