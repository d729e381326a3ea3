# Drawn shapes, as tools/make_shapes.py leaves them in data/shapes, at their own size.
_base_ = "custom_coco.py"

data_root = "{{$DATA_ROOT:data/shapes}}/"
classes = ("circle", "square", "triangle", "star")

data = dict(
    data_root=data_root, metainfo=dict(classes=classes), data_prefix=dict(img="JPEGImages/")
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(160, 160), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(160, 160), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(batch_size=4, dataset=dict(**data, pipeline=train_pipeline))
val_dataloader = dict(batch_size=8, dataset=dict(**data, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/val.json")
test_evaluator = val_evaluator
