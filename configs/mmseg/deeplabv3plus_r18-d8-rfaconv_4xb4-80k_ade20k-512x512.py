# Without the hooks of ../_base_/repeatable.py, which need training by epochs.
_base_ = "mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-80k_ade20k-512x512.py"
custom_imports = dict(imports=["rfa_mmdet"])

model = dict(
    pretrained="open-mmlab://resnet18_v1c",
    backbone=dict(
        _delete_=True,
        type="mmdet.Retrofit",
        module=dict(_base_.model.backbone, depth=18),
        edits=[dict(where=r"layer[234]\.\d\.conv1", conv=dict(type="RFAConv"))],
    ),
    decode_head=dict(in_channels=512, channels=128, c1_in_channels=64, c1_channels=12),
    auxiliary_head=dict(in_channels=256, channels=64),
)
