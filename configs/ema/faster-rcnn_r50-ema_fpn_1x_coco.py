_base_ = ["mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "../_base_/repeatable.py"]
custom_imports = dict(imports=["rfa_mmdet"])

model = dict(
    backbone=dict(
        type="RFAResNet",
        plugins=[
            dict(
                cfg=dict(type="EMA", factor=32, start="identity"),
                stages=(False, True, True, True),
                position="after_conv3",
            )
        ],
    )
)
