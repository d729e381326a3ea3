# Plain and five systems on the demo's shapes, for half of the demo's epochs: 3 minutes a run on a
# core.
#   python tools/make_shapes.py data/shapes
#   python tools/ablate.py configs/ablation/shapes.py --jobs 2
base = "../demo/atss_r18-rfaconv_fpn_8e_shapes.py"
metric = "coco/bbox_mAP"
seeds = tuple(range(10))

max_epochs = 4
options = {
    "train_cfg.max_epochs": max_epochs,
    "train_cfg.val_interval": 2,
    "param_scheduler.1.T_max": max_epochs,
    "param_scheduler.1.end": max_epochs,
}

plain = {"model.backbone.rfa": None, "model.backbone.stage_with_rfa": None}
place = dict(stages=(False, True, True, True), position="after_conv2")
ema = dict(cfg=dict(type="EMA", factor=8), **place)
conam = dict(cfg=dict(type="ConAM", patch_size=4, hidden_channels=16), **place)

methods = {
    "plain": plain,
    "RFAConv": {"model.backbone.rfa": dict(type="RFAConv")},
    "RFCAConv": {"model.backbone.rfa": dict(type="RFCAConv")},
    "RFCBAMConv": {"model.backbone.rfa": dict(type="RFCBAMConv")},
    "EMA": {**plain, "model.backbone.plugins": [ema]},
    "ConAM": {**plain, "model.backbone.plugins": [conam]},
}
