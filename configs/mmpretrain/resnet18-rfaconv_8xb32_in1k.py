_base_ = ["mmpretrain::resnet/resnet18_8xb32_in1k.py", "../_base_/repeatable.py"]
custom_imports = dict(imports=["rfa_mmdet"])

model = dict(
    backbone=dict(
        type="mmdet.RFAResNet",
        # With a bias, as the paper counts its parameters.
        rfa=dict(type="RFAConv", bias=True),
        norm_eval=False,
    )
)
