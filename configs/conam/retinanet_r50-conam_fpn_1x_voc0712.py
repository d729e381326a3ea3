_base_ = "../_base_/retinanet_r50_fpn_1x_voc0712.py"
custom_imports = dict(imports=["rfa_mmdet"])

model = dict(
    backbone=dict(
        type="RFAResNet",
        plugins=[
            dict(
                cfg=dict(type="ConAM", patch_size=4, hidden_channels=16, start="identity"),
                stages=(False, True, True, True),
                position="after_conv3",
            )
        ],
    )
)
