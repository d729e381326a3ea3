# Drawn shapes, with a detector small enough to train in minutes on a CPU.
_base_ = [
    "../_base_/models/retinanet_r18-rfaconv_fpn.py",
    "../_base_/datasets/shapes.py",
    "../_base_/schedules/adamw_50e.py",
]

# A quarter of the width. ATSS's head learns faster than RetinaNet's, as it gives an object more
# cells to learn from. One anchor per cell, and levels for objects of 10 to 140 pixels.
strides = [8, 16, 32]
model = dict(
    type="ATSS",
    backbone=dict(base_channels=32),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64, num_outs=len(strides)),
    bbox_head=dict(
        _delete_=True,
        type="ATSSHead",
        num_classes=len(_base_.classes),
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        norm_cfg=_base_.norm_cfg,
        anchor_generator=dict(
            type="AnchorGenerator",
            ratios=[1.0],
            octave_base_scale=4,
            scales_per_octave=1,
            strides=strides,
        ),
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_stds=[0.1, 0.1, 0.2, 0.2]),
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25),
        loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
        loss_centerness=dict(type="CrossEntropyLoss", use_sigmoid=True),
    ),
    train_cfg=dict(
        _delete_=True,
        assigner=dict(type="ATSSAssigner", topk=9),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
    test_cfg=dict(nms=dict(type="nms", iou_threshold=0.6)),
)

max_epochs = 8
randomness = dict(seed=0)
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(
        type="CosineAnnealingLR",
        T_max=max_epochs,
        eta_min=1e-5,
        by_epoch=True,
        begin=0,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
