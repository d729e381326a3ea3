# Any set in VOC layout (JPEGImages, Annotations, ImageSets/Main). From the environment, on the
# command line before the tool:
#   DATA_ROOT  the folder; CLASSES  names as in the annotations, separated by commas;
#   TRAIN_SET, VAL_SET, TEST_SET  image sets, if other than train, val and test;
#   IMG_DIR, ANN_DIR  folders of images and of XML files, if other than in VOC.
dataset_type = "XMLDataset"
data_root = "{{$DATA_ROOT:data/custom}}/"
classes = tuple(name.strip() for name in "{{$CLASSES:object}}".split(","))

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    # XMLDataset keeps inverted and empty boxes, which turn a loss into NaN.
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
        # CocoMetric takes the ground truth from `instances`, as there is no COCO file.
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
        ann_file="ImageSets/Main/{{$VAL_SET:val}}.txt",
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
        ann_file="ImageSets/Main/{{$TEST_SET:test}}.txt",
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
val_evaluator = [
    dict(type="CocoMetric", metric="bbox"),
    dict(type="VOCMetric", metric="mAP", eval_mode="area"),
]
test_evaluator = val_evaluator
