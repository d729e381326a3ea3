_base_ = "mmdet::yolox/yolox_s_8xb8-300e_coco.py"
custom_imports = dict(imports=["rfa_mmdet"])
# As ../_base_/repeatable.py, beside the base's own.
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
            # Behind the last stage, 480 to 800 pixels are 15 x 15 to 25 x 25 cells.
            dict(
                after=r"stage[234]\.\d\.blocks\.\d",
                plugin=dict(type="ConAM", patch_size=4, hidden_channels=16, start="paper"),
            )
        ],
    )
)
