# Five systems on the demo's shapes, from scratch, and then started from the plain detector.
#   python tools/make_shapes.py data/shapes
#   python tools/ablate.py configs/ablation/shapes.py
base = "../demo/atss_r18-rfaconv_fpn_8e_shapes.py"
metric = "coco/bbox_mAP"
seeds = (0, 1, 2)

plain = {"model.backbone.rfa": None, "model.backbone.stage_with_rfa": None}
place = dict(stages=(False, True, True, True), position="after_conv2")
ema = dict(cfg=dict(type="EMA", factor=8), **place)
conam = dict(cfg=dict(type="ConAM", patch_size=4, hidden_channels=16), **place)

methods = {
    "plain": plain,
    "RFAConv": {"model.backbone.rfa": dict(type="RFAConv")},
    "RFCAConv": {"model.backbone.rfa": dict(type="RFCAConv")},
    "EMA": {**plain, "model.backbone.plugins": [ema]},
    "ConAM": {**plain, "model.backbone.plugins": [conam]},
}

# The warm start continues from the plain detector of the same seed, for a third of the epochs and
# at a third of the rate.
max_epochs = 2
stages = dict(
    scratch=dict(),
    warm_start=dict(
        load_from="scratch",
        options={
            "train_cfg.max_epochs": max_epochs,
            "optim_wrapper.optimizer.lr": 6e-4,
            "param_scheduler.1.T_max": max_epochs,  # the cosine, behind the warm-up
            "param_scheduler.1.end": max_epochs,
        },
    ),
)
