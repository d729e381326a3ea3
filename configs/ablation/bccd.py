# All systems on BCCD's blood cells (https://github.com/Shenggan/BCCD_Dataset, MIT licence) in
# data/BCCD, a RetinaNet R18 from scratch, and then started from the plain detector. The best epoch
# on val is tested once on test.
#   python tools/ablate.py configs/ablation/bccd.py --jobs 4
base = "../custom/retinanet_r18-rfaconv_fpn_50e_custom-voc.py"
environment = dict(DATA_ROOT="data/BCCD", CLASSES="RBC,WBC,Platelets", TEST_SET="test")
metric = "coco/bbox_mAP"
seeds = (0, 1, 2)
checkpoint = "best"

plain = {"model.backbone.rfa": None, "model.backbone.stage_with_rfa": None}
place = dict(stages=(False, True, True, True), position="after_conv2")
convs = ("RFAConv", "RFCBAMConv", "RFCAConv", "CAMConv", "CBAMConv", "CAConv")
plugins = dict(
    EMA=dict(type="EMA", factor=32),
    ConAM=dict(type="ConAM", patch_size=4, hidden_channels=16),
    CBAM=dict(type="CBAM"),
    CoordAtt=dict(type="CoordAtt"),
    SE=dict(type="SE"),
    ECA=dict(type="ECA"),
)

methods = {"plain": plain}
for conv in convs:
    methods[conv] = {"model.backbone.rfa": dict(type=conv)}
for name, cfg in plugins.items():
    methods[name] = {**plain, "model.backbone.plugins": [dict(cfg=cfg, **place)]}
    cfg = dict(cfg, start="identity")
    methods[f"{name}-identity"] = {**plain, "model.backbone.plugins": [dict(cfg=cfg, **place)]}

# The warm start continues from the plain detector of the same seed, with a fifth of the rate.
max_epochs = 15
stages = dict(
    scratch=dict(methods=("plain", *convs, *plugins)),
    warm_start=dict(
        load_from="scratch",
        methods=("plain", *convs, *(f"{name}-identity" for name in plugins)),
        options={
            "train_cfg.max_epochs": max_epochs,
            "optim_wrapper.optimizer.lr": 2e-4,
            "param_scheduler.1.T_max": max_epochs,  # the cosine schedule after the warm-up
            "param_scheduler.1.end": max_epochs,
        },
    ),
)
