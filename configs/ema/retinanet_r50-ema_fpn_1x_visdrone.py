_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "../_base_/datasets/visdrone.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/repeatable.py",
]
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
    ),
    bbox_head=dict(num_classes=10),
)
# As in mmdet's RetinaNet configs.
optim_wrapper = dict(optimizer=dict(lr=0.01))
