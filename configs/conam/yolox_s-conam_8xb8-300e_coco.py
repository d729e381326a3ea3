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
            # After the last stage, images of 480 to 800 pixels are maps of 15 x 15 to 25 x 25.
            dict(
                after=r"stage[234]\.\d\.blocks\.\d",
                plugin=dict(type="ConAM", patch_size=4, hidden_channels=16, start="paper"),
            )
        ],
    )
)
