# A quarter of ResNet-18's width, on 32 x 32 crops of drawn shapes, which a CPU learns in minutes:
#   python tools/make_shapes.py data/small_shapes --val 480 --crops 32
#   python tools/train.py configs/mmpretrain/resnet18-rfaconv_8e_shapes.py
# Without the hooks of ../_base_/repeatable.py, like the results in docs/results.md.
_base_ = "mmpretrain::resnet/resnet18_8xb16_cifar10.py"
custom_imports = dict(imports=["rfa_mmdet"])

data_preprocessor = dict(num_classes=4, to_rgb=True)

model = dict(
    backbone=dict(
        _delete_=True,
        type="mmdet.Retrofit",
        module=dict(type="ResNet_CIFAR", depth=18, base_channels=16, stem_channels=16),
        edits=[dict(where=r"layer\d\.\d\.conv1", conv=dict(type="RFAConv", bias=True))],
    ),
    head=dict(num_classes=4, in_channels=128),
)

crops = dict(
    type="CustomDataset",
    data_root="data/small_shapes/crops",
    classes=("circle", "square", "star", "triangle"),  # in the order of the folders
)
load, pack = dict(type="LoadImageFromFile"), dict(type="PackInputs")
augment = [
    dict(type="RandomCrop", crop_size=32, padding=4),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
]
loader = dict(batch_size=32, num_workers=0, persistent_workers=False)
train_dataloader = dict(
    **loader,
    dataset=dict(_delete_=True, **crops, data_prefix="train", pipeline=[load, *augment, pack]),
)
val_dataloader = dict(
    **loader, dataset=dict(_delete_=True, **crops, data_prefix="val", pipeline=[load, pack])
)
test_dataloader = val_dataloader

max_epochs = 8
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=0.003, weight_decay=0.05),
)
param_scheduler = dict(
    _delete_=True,
    type="CosineAnnealingLR",
    T_max=max_epochs,
    by_epoch=True,
    convert_to_iter_based=True,
)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1))
