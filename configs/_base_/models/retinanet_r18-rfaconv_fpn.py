# RetinaNet with RFAConv in its ResNet-18, to be trained from scratch: no pretrained weights, so
# nothing is frozen and BN learns its statistics.
_base_ = "mmdet::_base_/models/retinanet_r50_fpn.py"
custom_imports = dict(imports=["rfa_mmdet"])

model = dict(
    backbone=dict(
        type="RFAResNet",
        depth=18,
        rfa=dict(type="RFAConv"),
        stage_with_rfa=(True, True, True, True),
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
