# Plain against RFAConv on BCCD's blood cells (https://github.com/Shenggan/BCCD_Dataset, MIT
# licence) in data/BCCD, with images and detector small enough for 2 CPU cores in half an hour. The
# best epoch on val is tested once on test.
#   python tools/ablate.py configs/ablation/bccd_small.py --jobs 2
base = "../custom/retinanet_r18-rfaconv_fpn_50e_custom-voc.py"
environment = dict(DATA_ROOT="data/BCCD", CLASSES="RBC,WBC,Platelets", TEST_SET="test")
metric = "coco/bbox_mAP"
seeds = (0, 1, 2)
checkpoint = "best"

max_epochs = 12
scale = (320, 240)
options = {
    # A quarter of the width, as of the demo's detector; half of the images' size.
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
stages = dict(scratch=dict(options=options))
methods = {
    "plain": {"model.backbone.rfa": None, "model.backbone.stage_with_rfa": None},
    "RFAConv": {"model.backbone.rfa": dict(type="RFAConv")},
}
