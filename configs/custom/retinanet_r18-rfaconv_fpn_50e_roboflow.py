_base_ = [
    "../_base_/models/retinanet_r18-rfaconv_fpn.py",
    "../_base_/datasets/roboflow.py",
    "../_base_/schedules/adamw_50e.py",
]

model = dict(bbox_head=dict(num_classes=len(_base_.classes)))
