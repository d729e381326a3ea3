_base_ = ["mmpretrain::resnet/resnet50_8xb16_cifar100.py", "../_base_/repeatable.py"]
custom_imports = dict(imports=["rfa_mmdet"])

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmdet.Retrofit",
        module={{_base_.model.backbone}},
        edits=[
            dict(
                after=r"layer\d\.\d\.bn3",
                plugin=dict(type="EMA", factor=32, start="paper"),
            )
        ],
    )
)
