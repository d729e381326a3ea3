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
            # The input is a sum of up to two SiLU outputs, each at least -0.28.
            dict(
                where=r"stage[234]\.\d\.blocks\.\d\.conv1",
                conv=dict(type="RFAConv", bias=True, input_floor=-1.0),
            )
        ],
    )
)
