_base_ = ["mmdet::atss/atss_r50_fpn_1x_coco.py", "../_base_/repeatable.py"]
custom_imports = dict(imports=["rfa_mmdet"])

model = dict(
    backbone=dict(
        _delete_=True,
        type="Retrofit",
        module={{_base_.model.backbone}},
        edits=[dict(where=r"layer[234]\.\d+\.conv2", conv=dict(type="RFAConv"))],
    )
)
