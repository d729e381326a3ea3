_base_ = "mmyolo::yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py"
custom_imports = dict(imports=["rfa_mmdet"])
# The hooks of ../_base_/repeatable.py, in addition to the base config's.
custom_hooks = [
    *_base_.custom_hooks,
    dict(type="EpochSeedHook"),
    dict(type="SyncBuffersHook"),
]
# Without the _scope_ that MMEngine adds to a base of another package, and passes to the function.
train_dataloader = dict(collate_fn=dict(_delete_=True, type="yolov5_collate"))

# The stride-2 convolutions after the stem. Their input is a SiLU output, at least -0.28.
rfa = dict(type="RFAConv", bias=True, input_floor=-0.3)
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmdet.Retrofit",
        module={{_base_.model.backbone}},
        edits=[dict(where=r"stage\d\.0", conv=rfa)],
    ),
    neck=dict(
        _delete_=True,
        type="mmdet.Retrofit",
        module={{_base_.model.neck}},
        edits=[dict(where=r"downsample_layers\.\d", conv=rfa)],
    ),
)
