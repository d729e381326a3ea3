_base_ = "../_base_/faster-rcnn_r50_fpn_1x_voc0712.py"
custom_imports = dict(imports=["rfa_mmdet"])

model = dict(
    backbone=dict(
        type="RFAResNet",
        rfa=dict(type="RFCAConv"),
        stage_with_rfa=(False, True, True, True),
    )
)
