_base_ = "mmdet::yolox/yolox_s_8xb8-300e_coco.py"
custom_imports = dict(imports=["rfa_mmdet"])
# The hooks of ../_base_/repeatable.py, in addition to the base config's.
custom_hooks = [
    *_base_.custom_hooks,
    dict(type="EpochSeedHook"),
    dict(type="SyncBuffersHook"),
]

model = dict(
    backbone=dict(
        _delete_=True,
        type="Retrofit",
        module={{_base_.model.backbone}},
        edits=[
            dict(
                after=r"stage[234]\.\d\.blocks\.\d",
                plugin=dict(type="EMA", factor=32, start="paper"),
            )
        ],
    )
)
