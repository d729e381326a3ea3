_base_ = "mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py"
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
            # After the last stage, a 640 x 640 image is a 20 x 20 map: 25 patches.
            dict(
                after=r"stage[234]\.\d\.blocks\.\d",
                plugin=dict(type="ConAM", patch_size=4, hidden_channels=16, start="identity"),
            )
        ],
    )
)
