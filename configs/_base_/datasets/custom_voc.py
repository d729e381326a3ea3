# Any dataset in VOC layout (JPEGImages, Annotations, ImageSets/Main) with images of any suffix,
# configured by environment variables:
#   DATA_ROOT  folder of the dataset
#   CLASSES  class names as in the annotations, separated by commas
#   TRAIN_SET, VAL_SET  image sets; default: train and val
#   TEST_SET  image set to test on, e.g. test; default: VAL_SET
#   IMG_DIR, ANN_DIR  folders of images and XML files; default: as in VOC
dataset_type = "AnyImageXMLDataset"
data_root = "{{$DATA_ROOT:data/custom}}/"
classes = tuple(name.strip() for name in "{{$CLASSES:object}}".split(",") if name.strip())
val_set = "{{$VAL_SET:val}}"
test_set = "{{$TEST_SET:VAL_SET}}".replace("VAL_SET", val_set)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    # Drop boxes of at most a pixel.
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1, 1)),
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
        # Without a COCO file, CocoMetric takes the ground truth from `instances`.
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "instances"),
    ),
]
dataset = dict(
    type=dataset_type,
    data_root=data_root,
    metainfo=dict(classes=classes),
    data_prefix=dict(sub_data_root=""),
    img_subdir="{{$IMG_DIR:JPEGImages}}",
    ann_subdir="{{$ANN_DIR:Annotations}}",
)
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=True),
    batch_sampler=dict(type="AspectRatioBatchSampler"),
    dataset=dict(
        **dataset,
        ann_file="ImageSets/Main/{{$TRAIN_SET:train}}.txt",
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
        **dataset,
        ann_file=f"ImageSets/Main/{val_set}.txt",
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
        **dataset,
        ann_file=f"ImageSets/Main/{test_set}.txt",
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
val_evaluator = [
    dict(type="CocoMetric", metric="bbox"),
    dict(type="VOCMetric", metric="mAP", eval_mode="area"),
]
test_evaluator = val_evaluator
