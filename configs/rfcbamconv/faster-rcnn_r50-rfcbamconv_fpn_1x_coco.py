_base_ = ["mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "../_base_/repeatable.py"]
custom_imports = dict(imports=["rfa_mmdet"])

model = dict(
    backbone=dict(
        type="RFAResNet",
        rfa=dict(type="RFCBAMConv"),
        stage_with_rfa=(False, True, True, True),
    )
)
