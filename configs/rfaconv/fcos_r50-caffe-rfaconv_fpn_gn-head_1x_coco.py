_base_ = ["mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py", "../_base_/repeatable.py"]
custom_imports = dict(imports=["rfa_mmdet"])

model = dict(
    backbone=dict(
        _delete_=True,
        type="Retrofit",
        module={{_base_.model.backbone}},
        edits=[dict(where=r"layer[234]\.\d+\.conv2", conv=dict(type="RFAConv"))],
    )
)
