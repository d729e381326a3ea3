# A Roboflow export in COCO format: folders train, valid and test, each with images and an
# _annotations.coco.json. Set DATA_ROOT and CLASSES as for custom_coco.py, and TEST_SET=valid if
# there is no test folder. Do not list Roboflow's parent category (id 0), which has no boxes, in
# CLASSES.
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
