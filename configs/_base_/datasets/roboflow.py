# A Roboflow export in COCO format: train, valid and test, each with images beside their
# _annotations.coco.json. DATA_ROOT and CLASSES as of custom_coco.py; TEST_SET=valid where there is
# no test. The category of id 0, which Roboflow adds as the parent of the others, has no boxes and
# is none of the classes.
_base_ = "custom_coco.py"

test_set = "{{$TEST_SET:test}}"
train_dataloader = dict(
    dataset=dict(ann_file="train/_annotations.coco.json", data_prefix=dict(img="train/"))
)
val_dataloader = dict(
    dataset=dict(ann_file="valid/_annotations.coco.json", data_prefix=dict(img="valid/"))
)
test_dataloader = dict(
    dataset=dict(
        ann_file=f"{test_set}/_annotations.coco.json", data_prefix=dict(img=f"{test_set}/")
    )
)
val_evaluator = dict(ann_file=_base_.data_root + "valid/_annotations.coco.json")
test_evaluator = dict(ann_file=_base_.data_root + f"{test_set}/_annotations.coco.json")
