# Photographs of playing cards in data/cards (363 images, six classes, from
# https://github.com/EdjeElectronics/TensorFlow-Object-Detection-API-Tutorial-Train-Multiple-Objects-Windows-10,
# Apache-2.0, in VOC layout), with the small detector of bccd_small.py.
#   python tools/ablate.py configs/ablation/cards_small.py --jobs 2
_base_ = "bccd_small.py"

environment = dict(DATA_ROOT="data/cards", CLASSES="nine,ten,jack,queen,king,ace", TEST_SET="test")

max_epochs = 20
scale = (320, 320)
options = {
    "model.bbox_head.num_classes": 6,
    "train_dataloader.dataset.pipeline.3.scale": scale,
    "val_dataloader.dataset.pipeline.1.scale": scale,
    "test_dataloader.dataset.pipeline.1.scale": scale,
    "train_cfg.max_epochs": max_epochs,
    "param_scheduler.1.T_max": max_epochs,
    "param_scheduler.1.end": max_epochs,
}

stages = dict(
    _delete_=True,
    scratch=dict(methods=("plain", "RFAConv", "RFCAConv", "RFCBAMConv", "EMA", "ConAM")),
)
