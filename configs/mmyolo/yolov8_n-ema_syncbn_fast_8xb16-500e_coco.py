_base_ = "mmyolo::yolov8/yolov8_n_syncbn_fast_8xb16-500e_coco.py"
custom_imports = dict(imports=["rfa_mmdet"])
# The hooks of ../_base_/repeatable.py, in addition to the base config's.
custom_hooks = [
    *_base_.custom_hooks,
    dict(type="EpochSeedHook"),
    dict(type="SyncBuffersHook"),
]
# Without the _scope_ that MMEngine adds to a base of another package, and passes to the function.
train_dataloader = dict(collate_fn=dict(_delete_=True, type="yolov5_collate"))

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmdet.Retrofit",
        module={{_base_.model.backbone}},
        edits=[
            # Before SPPF in stage 4, as the authors have it.
            dict(after=r"stage[34]\.1", plugin=dict(type="EMA", factor=32, start="paper"))
        ],
    )
)
