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
            # A SiLU, at least -0.28, comes in.
            dict(
                where=r"stage[234]\.\d\.blocks\.\d\.conv2",
                conv=dict(type="RFAConv", bias=True, input_floor=-0.3),
            )
        ],
    )
)
