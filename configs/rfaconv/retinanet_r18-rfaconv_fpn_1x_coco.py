_base_ = ["mmdet::retinanet/retinanet_r18_fpn_1x_coco.py", "../_base_/repeatable.py"]
custom_imports = dict(imports=["rfa_mmdet"])

model = dict(
    backbone=dict(
        type="RFAResNet",
        rfa=dict(type="RFAConv"),
        stage_with_rfa=(False, True, True, True),
    )
)
