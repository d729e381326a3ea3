# VisDrone2019-DET with ten classes, in COCO format. To convert the folders VisDrone2019-DET-train,
# -val and -test-dev in data/VisDrone:  python tools/dataset_converters/visdrone.py data/VisDrone
_base_ = "mmdet::_base_/datasets/coco_detection.py"

data_root = "{{$DATA_ROOT:data/VisDrone}}/"
metainfo = dict(
    classes=(
        *("pedestrian", "people", "bicycle", "car", "van", "truck", "tricycle"),
        *("awning-tricycle", "bus", "motor"),
    )
)
train_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/train.json",
        data_prefix=dict(img="VisDrone2019-DET-train/images/"),
    )
)
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/val.json",
        data_prefix=dict(img="VisDrone2019-DET-val/images/"),
    )
)
test_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file="annotations/test-dev.json",
        data_prefix=dict(img="VisDrone2019-DET-test-dev/images/"),
    )
)
val_evaluator = dict(ann_file=data_root + "annotations/val.json")
test_evaluator = dict(ann_file=data_root + "annotations/test-dev.json")
