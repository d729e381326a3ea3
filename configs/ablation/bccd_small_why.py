# Why is RFAConv worse than plain on BCCD in bccd_small.py? One change to it at a time.
#   python tools/ablate.py configs/ablation/bccd_small_why.py --jobs 2
_base_ = "bccd_small.py"

plain = {"model.backbone.rfa": None, "model.backbone.stage_with_rfa": None}
rfaconv = {"model.backbone.rfa": dict(type="RFAConv")}


def features(**options):
    """RFAConv with other settings of its features."""
    return {"model.backbone.rfa": dict(type="RFAConv", **options)}


def new_parameters(**options):
    """RFAConv with other settings of the optimizer for what a plain convolution does not have."""
    keys = dict.fromkeys(("feature.weight", "attention.weight"), options)
    return {**rfaconv, "optim_wrapper.paramwise_cfg": dict(custom_keys=keys)}


def strided():
    """RFAConv only as the first 3x3 convolution of stages 2 to 4, which has stride 2."""
    edits = [dict(where=r"layer[234]\.0\.conv1", conv=dict(type="RFAConv", bias=True))]
    module = dict(
        type="RFAResNet",
        depth=18,
        base_channels=32,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=-1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=False,
        style="pytorch",
    )
    return {"model.backbone": dict(_delete_=True, type="Retrofit", module=module, edits=edits)}


augmented = {
    "train_dataloader.dataset.pipeline": [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True),
        dict(type="FilterAnnotations", min_gt_bbox_wh=(1, 1)),
        dict(type="PhotoMetricDistortion"),
        dict(type="RandomResize", scale=(320, 240), ratio_range=(0.8, 1.25), keep_ratio=True),
        dict(type="RandomCrop", crop_size=(240, 320), allow_negative_crop=True),
        dict(type="RandomFlip", prob=0.5, direction=["horizontal", "vertical"]),
        dict(type="PackDetInputs"),
    ]
}

twice = {
    "train_cfg.max_epochs": 24,
    "param_scheduler.1.T_max": 24,
    "param_scheduler.1.end": 24,
}

methods = {
    "_delete_": True,
    "plain": plain,
    "RFAConv": rfaconv,
    "group-norm": features(norm_cfg=dict(type="GN", num_groups=16)),
    "no-norm": features(norm_cfg=None),
    "slow-statistics": features(norm_cfg=dict(type="BN", momentum=0.02)),
    "no-decay": new_parameters(decay_mult=0.0),
    "low-rate": new_parameters(lr_mult=0.3),
    "stage-4": {"model.backbone.stage_with_rfa": (False, False, False, True)},
    "stride-2": strided(),
}
stages = dict(
    _delete_=True,
    scratch=dict(),
    augmented=dict(methods=("plain", "RFAConv"), options=augmented),
    augmented_twice=dict(methods=("plain", "RFAConv"), options={**augmented, **twice}),
)
