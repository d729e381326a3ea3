"""A small config of every mmdet module that Retrofit is tested on, and inputs for it."""

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """A module, the layers to replace, and the modules to add a plug-in after."""

    cfg: dict
    where: str
    after: str
    inputs: str  # 'image', 'maps' or 'regions'
    floor: float = 0.0  # lowest input of the replaced convolutions
    groups: int = 1


BN = dict(type="BN", requires_grad=True)
GN = dict(type="GN", num_groups=4, requires_grad=True)
ANCHORS = dict(
    type="AnchorGenerator", octave_base_scale=4, scales_per_octave=1, ratios=[1.0], strides=[8, 16]
)
ONE_ANCHOR = dict(
    type="AnchorGenerator", ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[8, 16]
)
HR = dict(
    stage1=dict(
        num_modules=1, num_branches=1, block="BOTTLENECK", num_blocks=(1,), num_channels=(8,)
    ),
    stage2=dict(
        num_modules=1, num_branches=2, block="BASIC", num_blocks=(1, 1), num_channels=(8, 16)
    ),
    stage3=dict(
        num_modules=1, num_branches=3, block="BASIC", num_blocks=(1,) * 3, num_channels=(8, 16, 32)
    ),
    stage4=dict(
        num_modules=1,
        num_branches=4,
        block="BASIC",
        num_blocks=(1,) * 4,
        num_channels=(8, 16, 32, 64),
    ),
)

BACKBONES = {
    "ResNet": Case(
        dict(type="ResNet", depth=50, base_channels=8),
        r"layer[234]\..*\.conv2",
        r"layer4\.\d+",
        "image",
    ),
    "ResNeXt": Case(
        dict(type="ResNeXt", depth=50, base_channels=8, groups=4, base_width=8),
        r"layer[34]\..*\.conv2",
        r"layer4\.\d+$",
        "image",
        groups=4,
    ),
    "Res2Net": Case(
        dict(type="Res2Net", depth=50, base_channels=8, scales=2, base_width=26),
        r"layer[34]\..*\.convs\.\d",
        r"layer4\.\d+",
        "image",
    ),
    "RegNet": Case(
        dict(
            type="RegNet",
            arch=dict(w0=16, wa=16.0, wm=2.0, group_w=8, depth=6, bot_mul=1.0),
        ),
        r"layer\d\..*\.conv2",
        r"layer1\.\d+",
        "image",
        groups=8,
    ),
    "HRNet": Case(
        dict(type="HRNet", extra=HR),
        r"stage[34]\..*\.conv2",
        r"stage2\.0\.branches\.\d\.0",
        "image",
    ),
    "CSPDarknet": Case(
        dict(type="CSPDarknet", widen_factor=0.125, deepen_factor=0.33, out_indices=(2, 3, 4)),
        r"stage[34]\.1\.blocks\.\d\.conv2|stage[34]\.2\.blocks\.\d\.conv2",
        r"stage4\.0",
        "image",
        floor=-4,
    ),
    "CSPNeXt": Case(
        dict(type="CSPNeXt", widen_factor=0.125, deepen_factor=0.167, norm_cfg=BN),
        r"stage[34]\..*\.blocks\.\d\.conv1",
        r"stage4\.\d+\.blocks\.\d\.conv1",
        "image",
        floor=-4,
    ),
    "MobileNetV2": Case(
        dict(type="MobileNetV2", widen_factor=0.25),
        r"layer[3-6]\.\d\.depthwise_conv",
        r"layer5\.0",
        "image",
        groups=96,
    ),
    "SwinTransformer": Case(
        dict(
            type="SwinTransformer",
            embed_dims=16,
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 4, 8),
            drop_path_rate=0.0,
        ),
        r"patch_embed\.projection",
        r"patch_embed\.projection",
        "image",
        floor=-6,
    ),
}

NECKS = {
    "FPN": Case(
        dict(type="FPN", in_channels=[8, 16, 32], out_channels=16, num_outs=4),
        r"fpn_convs\.\d",
        r"lateral_convs\.[01]",
        "maps",
        floor=-64,
    ),
    "PAFPN": Case(
        dict(type="PAFPN", in_channels=[8, 16, 32], out_channels=16, num_outs=4),
        r"(fpn|pafpn|downsample)_convs\.\d\.conv",
        r"pafpn_convs\.1",
        "maps",
        floor=-64,
    ),
    "CSPNeXtPAFPN": Case(
        dict(
            type="CSPNeXtPAFPN",
            in_channels=[8, 16, 32],
            out_channels=16,
            num_csp_blocks=1,
            norm_cfg=BN,
        ),
        r".*\.blocks\.0\.conv1",
        r"out_convs\.\d",
        "maps",
        floor=-4,
    ),
    "YOLOXPAFPN": Case(
        dict(type="YOLOXPAFPN", in_channels=[8, 16, 32], out_channels=16, num_csp_blocks=1),
        r"(bottom_up|top_down)_blocks\.\d\.blocks\.0\.conv2",
        r"bottom_up_blocks\.\d",
        "maps",
        floor=-4,
    ),
    "BFP": Case(
        dict(
            type="BFP",
            in_channels=16,
            num_levels=3,
            refine_level=1,
            refine_type="conv",
            norm_cfg=BN,
        ),
        r"refine",
        r"refine",
        "maps",
        floor=-16,
    ),
}

HEADS = {
    "RetinaHead": Case(
        dict(
            type="RetinaHead",
            num_classes=3,
            in_channels=16,
            feat_channels=16,
            stacked_convs=2,
            anchor_generator=ANCHORS,
        ),
        r"(cls|reg)_convs\.\d",
        r"cls_convs\.1",
        "maps",
        floor=-16,
    ),
    "FCOSHead": Case(
        dict(
            type="FCOSHead",
            num_classes=3,
            in_channels=16,
            feat_channels=16,
            stacked_convs=2,
            strides=[8, 16],
            norm_cfg=GN,
            conv_bias=True,
        ),
        r"(cls|reg)_convs\.\d",
        r"reg_convs\.\d",
        "maps",
        floor=-16,
    ),
    "ATSSHead": Case(
        dict(
            type="ATSSHead",
            num_classes=3,
            in_channels=16,
            feat_channels=16,
            stacked_convs=2,
            anchor_generator=ONE_ANCHOR,
            norm_cfg=GN,
        ),
        r"(cls|reg)_convs\.\d",
        r"reg_convs\.1",
        "maps",
        floor=-16,
    ),
    "RTMDetHead": Case(
        dict(
            type="RTMDetSepBNHead",
            num_classes=3,
            in_channels=16,
            feat_channels=16,
            stacked_convs=2,
            share_conv=True,
            anchor_generator=dict(type="MlvlPointGenerator", offset=0, strides=[8, 16]),
            bbox_coder=dict(type="DistancePointBBoxCoder"),
            norm_cfg=BN,
            with_objectness=False,
        ),
        r"(cls|reg)_convs\.0\.\d",
        r"cls_convs\.1\.1",
        "maps",
        floor=-16,
    ),
    "Shared4Conv1FCBBoxHead": Case(
        dict(
            type="Shared4Conv1FCBBoxHead",
            in_channels=16,
            conv_out_channels=16,
            fc_out_channels=16,
            num_classes=3,
            norm_cfg=BN,
        ),
        r"shared_convs\.\d",
        r"shared_convs\.3",
        "regions",
        floor=-16,
    ),
    "FCNMaskHead": Case(
        dict(
            type="FCNMaskHead",
            in_channels=16,
            conv_out_channels=16,
            num_convs=2,
            num_classes=3,
        ),
        r"convs\.\d",
        r"convs\.1",
        "regions",
        floor=-16,
    ),
}

CASES = {**BACKBONES, **NECKS, **HEADS}


def inputs_of(case: Case, seed: int = 0) -> tuple:
    """Return the arguments of one small forward pass."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).clamp(-4, 4).requires_grad_()

    if case.inputs == "image":
        return (normal(2, 3, 64, 64),)
    if case.inputs == "regions":
        return (normal(3, 16, 7, 7),)
    channels = case.cfg["in_channels"]
    channels = (
        channels if isinstance(channels, list) else [channels] * case.cfg.get("num_levels", 2)
    )
    sides = [16 // 2**i for i in range(len(channels))]
    return ([normal(2, c, side, side) for c, side in zip(channels, sides, strict=True)],)


def flat(outputs: object) -> list[Tensor]:
    """Return all tensors of a nested output in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for part in outputs if part is not None for tensor in flat(part)]


def relative(a: object, b: object) -> float:
    """Return the largest difference of two outputs, relative to the first's largest value."""
    pairs = zip(flat(a), flat(b), strict=True)
    return max(float((x - y).detach().abs().max() / x.detach().abs().max()) for x, y in pairs)
