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
                # The maps of the last stage are 4 x 4: four patches.
                plugin=dict(type="ConAM", patch_size=2, hidden_channels=16, start="paper"),
            )
        ],
    )
)
