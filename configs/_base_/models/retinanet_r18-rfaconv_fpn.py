# RetinaNet with RFAConv in its ResNet-18, to be trained from scratch: no pretrained weights, so
# nothing is frozen, BN learns its statistics, and neck and head are normalised too.
_base_ = "mmdet::_base_/models/retinanet_r50_fpn.py"
custom_imports = dict(imports=["rfa_mmdet"])

norm_cfg = dict(type="GN", num_groups=16)

model = dict(
    backbone=dict(
        type="RFAResNet",
        depth=18,
        rfa=dict(type="RFAConv"),
        # Not in the first stage: its maps are the largest, and RFAConv costs most there.
        stage_with_rfa=(False, True, True, True),
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[64, 128, 256, 512], norm_cfg=norm_cfg),
    bbox_head=dict(norm_cfg=norm_cfg),
)
