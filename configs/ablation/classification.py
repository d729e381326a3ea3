# Plain and five systems in a small classifier, on crops of the drawn shapes. In an environment with
# MMPretrain, see "Other tasks" in the documentation:
#   python tools/make_shapes.py data/small_shapes --val 480 --crops 32
#   python tools/ablate.py configs/ablation/classification.py --jobs 2
base = "../mmpretrain/resnet18-rfaconv_8e_shapes.py"
metric = "accuracy/top1"
seeds = (0, 1, 2)
samples = 0


def conv(name):
    """A system in the first 3 x 3 convolution of every block."""
    edit = dict(where=r"layer\d\.\d\.conv1", conv=dict(type=name, bias=True))
    return {"model.backbone.edits": [edit]}


def plugin(name, **options):
    """A plug-in after the last norm of every block, before the residual sum."""
    edit = dict(after=r"layer\d\.\d\.bn2", plugin=dict(type=name, start="paper", **options))
    return {"model.backbone.edits": [edit]}


methods = {
    "plain": {
        "model.backbone": dict(
            _delete_=True, type="ResNet_CIFAR", depth=18, base_channels=16, stem_channels=16
        )
    },
    "RFAConv": conv("RFAConv"),
    "RFCAConv": conv("RFCAConv"),
    "RFCBAMConv": conv("RFCBAMConv"),
    "EMA": plugin("EMA", factor=8),
    "ConAM": plugin("ConAM", patch_size=2, hidden_channels=16),
}
