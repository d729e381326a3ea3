# Any dataset in COCO format, configured by environment variables:
#   DATA_ROOT  folder of the dataset
#   CLASSES  class names as in the annotations, separated by commas
#   TRAIN_ANN, VAL_ANN, TRAIN_IMG, VAL_IMG  paths relative to DATA_ROOT; defaults below
#   TEST_ANN, TEST_IMG  default: VAL_ANN and VAL_IMG
dataset_type = "CocoDataset"
data_root = "{{$DATA_ROOT:data/custom}}/"
classes = tuple(name.strip() for name in "{{$CLASSES:object}}".split(",") if name.strip())
val_ann = "{{$VAL_ANN:annotations/val.json}}"
val_img = "{{$VAL_IMG:val}}/"
test_ann = "{{$TEST_ANN:VAL_ANN}}".replace("VAL_ANN", val_ann)
test_img = "{{$TEST_IMG:VAL_IMG}}/".replace("VAL_IMG/", val_img)
metainfo = dict(classes=classes)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(640, 640), keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(640, 640), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=True),
    batch_sampler=dict(type="AspectRatioBatchSampler"),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        ann_file="{{$TRAIN_ANN:annotations/train.json}}",
        data_prefix=dict(img="{{$TRAIN_IMG:train}}/"),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        ann_file=val_ann,
        data_prefix=dict(img=val_img),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=metainfo,
        ann_file=test_ann,
        data_prefix=dict(img=test_img),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
val_evaluator = dict(type="CocoMetric", ann_file=data_root + val_ann, metric="bbox")
test_evaluator = dict(type="CocoMetric", ann_file=data_root + test_ann, metric="bbox")
