# RetinaNet with RFAConv in its ResNet-18, for training from scratch: without pretrained weights,
# nothing is frozen, BN learns its statistics, and neck and head have norms too.
_base_ = "mmdet::_base_/models/retinanet_r50_fpn.py"
custom_imports = dict(imports=["rfa_mmdet"])

norm_cfg = dict(type="GN", num_groups=16)

model = dict(
    backbone=dict(
        type="RFAResNet",
        depth=18,
        rfa=dict(type="RFAConv"),
        # Not in the first stage, whose maps are the largest, so RFAConv is most expensive there.
        stage_with_rfa=(False, True, True, True),
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[64, 128, 256, 512], norm_cfg=norm_cfg),
    bbox_head=dict(norm_cfg=norm_cfg),
)
