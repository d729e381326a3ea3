"""Measure one training iteration of a whole detector, RetinaNet R50-FPN, plain and with RFAConv."""

from collections.abc import Callable

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.hub import get_config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import nn

from benchmarks.measure import interleaved, peak_bytes, ratio, spread

BASE = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
RFA = dict(
    type="RFAResNet", rfa=dict(type="RFAConv"), stage_with_rfa=(False, True, True, True)
)  # as in configs/rfaconv


def build_detector(device: torch.device, backbone: dict | None = None) -> nn.Module:
    """Build the untrained detector, with overrides for its backbone."""
    init_default_scope("mmdet")
    model = get_config(BASE).model
    model.backbone.pop("init_cfg")
    model.backbone.update(backbone or {})
    torch.manual_seed(0)
    return MODELS.build(model).to(device).train()


def training_step(
    model: nn.Module, size: int, batch: int, device: torch.device, half: torch.dtype | None
) -> Callable[[], None]:
    """Return an iteration (loss, backward, SGD) on random images of ``size`` x ``size``."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator).to(device)
    samples = []
    for _ in range(batch):
        boxes = torch.rand(8, 2, generator=generator) * size / 2
        sides = (0.1 + 0.4 * torch.rand(8, 2, generator=generator)) * size
        truth = InstanceData(bboxes=torch.cat([boxes, boxes + sides], 1), labels=torch.arange(8))
        meta = dict(img_shape=(size, size), pad_shape=(size, size), batch_input_shape=(size, size))
        samples.append(DetDataSample(metainfo=meta, gt_instances=truth.to(device)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9)

    def step() -> None:
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            losses = model(images, samples, mode="loss")
        loss, _ = model.parse_losses(losses)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # last, so that no gradients exist when the next run is measured

    return step


def measure_detector(
    size: int, device: torch.device, dtype: torch.dtype, seconds: float, rounds: int
) -> dict:
    """Measure both detectors in alternation.

    Args:
        size (int): Side of the images; the batch size is 2 on a CPU and 4 on a GPU.
        device (torch.device): Device to train on.
        dtype (torch.dtype): Dtype for autocast if half precision; float32 otherwise.
        seconds (float): Time to spend on timed iterations.
        rounds (int): Minimum number of iterations of each.

    Returns:
        dict: Seconds and peak bytes of each (beyond parameters and momentum), and the ratios of
            RFAConv to plain.
    """
    batch = 4 if device.type == "cuda" else 2
    half = dtype if dtype in (torch.bfloat16, torch.float16) else None
    steps = {
        name: training_step(build_detector(device, backbone), size, batch, device, half)
        for name, backbone in {"plain": None, "RFAConv": RFA}.items()
    }
    times = interleaved(steps, seconds, rounds, device)
    peaks = {name: peak_bytes(step, device) for name, step in steps.items()}
    return {
        "model": "RetinaNet R50-FPN, RFAConv in stages 2 to 4",
        "size": size,
        "batch": batch,
        "time_ratio": ratio(times["RFAConv"], times["plain"]),
        "peak_ratio": peaks["RFAConv"] / peaks["plain"],
        "seconds": {name: {**spread(t), "rounds": len(t)} for name, t in times.items()},
        "peak_bytes": peaks,
    }
