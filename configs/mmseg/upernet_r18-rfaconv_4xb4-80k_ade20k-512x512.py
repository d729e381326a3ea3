# Without the hooks of ../_base_/repeatable.py, which need training by epochs.
_base_ = "mmseg::upernet/upernet_r18_4xb4-80k_ade20k-512x512.py"
custom_imports = dict(imports=["rfa_mmdet"])

model = dict(
    data_preprocessor=dict(size=(512, 512)),  # missing in the base
    backbone=dict(
        _delete_=True,
        type="mmdet.Retrofit",
        module={{_base_.model.backbone}},
        edits=[dict(where=r"layer[234]\.\d\.conv1", conv=dict(type="RFAConv"))],
    ),
)
