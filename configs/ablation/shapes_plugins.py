# Plug-ins put into the trained plain detector, as their papers start and as the identity, on the
# demo's shapes.
#   python tools/make_shapes.py data/shapes
#   python tools/ablate.py configs/ablation/shapes_plugins.py
base = "../demo/atss_r18-rfaconv_fpn_8e_shapes.py"
metric = "coco/bbox_mAP"
seeds = (0, 1, 2)

plain = {"model.backbone.rfa": None, "model.backbone.stage_with_rfa": None}
place = dict(stages=(False, True, True, True), position="after_conv2")
plugins = dict(EMA=dict(type="EMA", factor=8), CBAM=dict(type="CBAM"), SE=dict(type="SE"))

methods = {"plain": plain}
for name, cfg in plugins.items():
    for start in ("paper", "identity"):
        plugin = dict(cfg=dict(cfg, start=start), **place)
        methods[f"{name}-{start}"] = {**plain, "model.backbone.plugins": [plugin]}

# All continue from the plain detector of the same seed.
max_epochs = 2
stages = dict(
    scratch=dict(methods=["plain"]),
    warm_start=dict(
        load_from="scratch",
        options={
            "train_cfg.max_epochs": max_epochs,
            "optim_wrapper.optimizer.lr": 6e-4,
            "param_scheduler.1.T_max": max_epochs,  # the cosine schedule after the warm-up
            "param_scheduler.1.end": max_epochs,
        },
    ),
)
