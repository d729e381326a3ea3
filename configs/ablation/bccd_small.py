# Plain and all twelve systems on BCCD's blood cells (https://github.com/Shenggan/BCCD_Dataset, MIT
# licence) in data/BCCD, with images and detector small enough for a CPU: 6 minutes a run on one
# core. Then the plain detector continued with a system put in. The best epoch on val is tested once
# on test. The last two stages are about the statistics of batch norms.
#   python tools/ablate.py configs/ablation/bccd_small.py --jobs 2
base = "../custom/retinanet_r18-rfaconv_fpn_50e_custom-voc.py"
environment = dict(DATA_ROOT="data/BCCD", CLASSES="RBC,WBC,Platelets", TEST_SET="test")
metric = "coco/bbox_mAP"
seeds = (0, 1, 2)
checkpoint = "best"

max_epochs = 12
scale = (320, 240)
options = {
    # A quarter of the width, like the demo's detector, and half of the images' size.
    "model.backbone.base_channels": 32,
    "model.neck.in_channels": [32, 64, 128, 256],
    "model.neck.out_channels": 64,
    "model.bbox_head.in_channels": 64,
    "model.bbox_head.feat_channels": 64,
    "model.bbox_head.stacked_convs": 2,
    "model.bbox_head.anchor_generator.octave_base_scale": 2,
    "train_dataloader.batch_size": 4,
    "train_dataloader.dataset.pipeline.3.scale": scale,
    "val_dataloader.dataset.pipeline.1.scale": scale,
    "test_dataloader.dataset.pipeline.1.scale": scale,
    "train_cfg.max_epochs": max_epochs,
    "param_scheduler.1.T_max": max_epochs,
    "param_scheduler.1.end": max_epochs,
}

plain = {"model.backbone.rfa": None, "model.backbone.stage_with_rfa": None}
place = dict(stages=(False, True, True, True), position="after_conv2")
convs = ("RFAConv", "RFCBAMConv", "RFCAConv", "CAMConv", "CBAMConv", "CAConv")
plugins = dict(
    EMA=dict(type="EMA", factor=8),
    ConAM=dict(type="ConAM", patch_size=4, hidden_channels=16),
    CBAM=dict(type="CBAM"),
    CoordAtt=dict(type="CoordAtt"),
    SE=dict(type="SE"),
    ECA=dict(type="ECA"),
)
identities = ("EMA", "CBAM", "SE")

methods = {"plain": plain}
for conv in convs:
    methods[conv] = {"model.backbone.rfa": dict(type=conv)}
for name, cfg in plugins.items():
    methods[name] = {**plain, "model.backbone.plugins": [dict(cfg=cfg, **place)]}
for name in identities:
    cfg = dict(plugins[name], start="identity")
    methods[f"{name}-identity"] = {**plain, "model.backbone.plugins": [dict(cfg=cfg, **place)]}

# The warm start continues from the plain detector of the same seed, with a fifth of the rate.
warm_epochs = 6
warm_options = {
    "train_cfg.max_epochs": warm_epochs,
    "optim_wrapper.optimizer.lr": 2e-4,
    "param_scheduler.1.T_max": warm_epochs,
    "param_scheduler.1.end": warm_epochs,
}
# Nothing is trained: four passes over the training set take the batch statistics anew.
slow_norm = dict(type="BN", momentum=0.02)
statistics_options = {
    "train_cfg.max_epochs": 4,
    "train_cfg.val_interval": 4,
    "optim_wrapper.optimizer.lr": 0.0,
    "param_scheduler": [],
    "model.backbone.norm_cfg": slow_norm,
    "model.backbone.rfa.norm_cfg": slow_norm,
}
two = ("plain", "RFAConv")
stages = dict(
    scratch=dict(methods=("plain", *convs, *plugins)),
    warm_start=dict(
        load_from="scratch",
        methods=(*two, *(f"{name}-identity" for name in identities)),
        options=warm_options,
    ),
    warm_start_norm_eval=dict(
        load_from="scratch",
        methods=two,
        options={**warm_options, "model.backbone.norm_eval": True},
    ),
    fresh_statistics=dict(
        load_from="scratch", load_method="own", methods=two, options=statistics_options
    ),
)
