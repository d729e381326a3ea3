"""A small model with new layers, and a real Runner around it."""

from pathlib import Path

import torch
from mmdet.models.backbones.resnet import ResNet
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import Dataset

from rfa_mmdet.models import retrofit
from tests.helpers.norms import randomise_norms

SMALL = dict(
    type="mmdet.ResNet",
    depth=18,
    base_channels=4,
    num_stages=2,
    strides=(1, 2),
    dilations=(1, 1),
    out_indices=(1,),
)
EDITS = [dict(where=r"layer[12]\.\d\.conv1", conv=dict(type="RFAConv"))]


def pictures(number: int, side: int = 64, seed: int = 0) -> Tensor:
    """Return images (number, 3, side, side) with structure at every scale, like photographs."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(number, 3, side, side)
    for scale in (1, 4, 16, 64):
        coarse = torch.rand(number, 3, side // scale, side // scale, generator=generator)
        found += nn.functional.interpolate(coarse, size=(side, side))
    return found - 2


def plain_backbone() -> nn.Module:
    torch.manual_seed(1)
    return randomise_norms(ResNet(**{k: v for k, v in SMALL.items() if k != "type"}))


class Toy(BaseModel):
    """A backbone and an unedited part; its loss needs no targets."""

    def __init__(self, retrofitted: bool = True, **kwargs) -> None:
        super().__init__()
        torch.manual_seed(0)
        plain = ResNet(**{k: v for k, v in {**SMALL, **kwargs}.items() if k != "type"})
        cfg = {**SMALL, **kwargs}
        self.backbone = retrofit(cfg, EDITS) if retrofitted else plain
        torch.manual_seed(2)
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.1))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: list[Tensor], mode: str) -> dict:
        assert mode == "loss"
        self.calls = self.calls + 1  # not in place
        out = self.head(self.backbone(torch.stack(inputs))[-1])
        return dict(loss=(out**2).mean())


class Pictures(Dataset):
    def __init__(self, number: int) -> None:
        self.all = pictures(number)

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, index: int) -> dict:
        return dict(inputs=self.all[index])


class Recorder(Hook):
    """Calls ``look(runner)`` at the start of training, after all other hooks."""

    priority = "LOWEST"

    def __init__(self, look) -> None:
        self.look = look

    def before_train(self, runner: Runner) -> None:
        self.look(runner)


def plain_file(path: Path) -> str:
    """Save a checkpoint of the plain toy."""
    model = Toy(retrofitted=False)
    model.backbone.load_state_dict(plain_backbone().state_dict())
    torch.save(dict(state_dict=model.state_dict(), meta={}), path)
    return str(path)


def make_runner(
    model: nn.Module,
    work_dir: Path,
    hooks: list,
    epochs: int = 1,
    batch: int = 4,
    number: int = 8,
    lr: float = 0.05,
    **kwargs,
) -> Runner:
    return Runner(
        model,
        str(work_dir),
        train_dataloader=dict(
            dataset=Pictures(number),
            batch_size=batch,
            num_workers=0,
            sampler=dict(type="DefaultSampler", shuffle=True),
            collate_fn=dict(type="pseudo_collate"),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=lr, momentum=0.9)),
        custom_hooks=[dict(type="EpochSeedHook"), *hooks],
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", interval=1)),
        randomness=dict(seed=0),
        experiment_name=f"{work_dir.name}-{id(model)}",
        **kwargs,
    )
