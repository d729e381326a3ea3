# MMDetection's config with our datasets, see AnyImageVOCDataset.
_base_ = ["mmdet::pascal_voc/retinanet_r50_fpn_1x_voc0712.py", "repeatable.py"]

dataset_type = "AnyImageVOCDataset"
both_years = [
    {**one, "type": dataset_type} for one in _base_.train_dataloader.dataset.dataset.datasets
]
train_dataloader = dict(dataset=dict(dataset=dict(datasets=both_years)))
val_dataloader = dict(dataset=dict(type=dataset_type))
test_dataloader = dict(dataset=dict(type=dataset_type))
