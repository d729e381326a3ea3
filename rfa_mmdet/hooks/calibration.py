"""Calibrate warm-started layers whose batch norm will use the statistics of batches.

A warm start makes that norm the identity on its running statistics. On a batch's own it is one when
its weight is their deviation and its bias their mean: what they are is seen in a few batches.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from rfa_mmdet.errors import ConfigError
from rfa_mmdet.hooks.new_layers import bare
from rfa_mmdet.layers.conv.receptive_field import ReceptiveFieldConv
from rfa_mmdet.layers.warm_start.identity import calibrate_norm, is_uncalibrated


@HOOKS.register_module()
class CalibrationHook(Hook):
    """Show the first batches to warm-started layers before training, and set their norms by them.

    Only to those in training mode: where ``norm_eval`` holds a norm at its running statistics, the
    warm start is exact as it is. ``tools/train.py`` adds the hook to every run; without layers to
    calibrate it does nothing.

    Args:
        batches (int): How many to look at. Defaults to 16.

    Raises:
        ConfigError: ``batches`` is not positive.

    Example:
        >>> custom_hooks = [dict(type="CalibrationHook", batches=32)]
    """

    priority = "LOW"  # after NewLayersHook has settled which norms use batches

    def __init__(self, batches: int = 16) -> None:
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
            raise ConfigError(f"CalibrationHook: batches={batches!r}: must be a positive int")
        self.batches = batches

    def before_train(self, runner: Runner) -> None:
        """Calibrate, and log what that changes on the last batch that is looked at."""
        model = bare(runner.model)
        model.train()
        if not uncalibrated(model):
            return
        losses, last = [], {}

        def runs() -> Iterator[Callable[[], None]]:
            for data in islice(runner.train_dataloader, self.batches):
                last.update(model.data_preprocessor(data, training=True))
                yield lambda: losses.append(_loss(model, last))

        layers, seen = calibrate(model, runs())
        with torch.no_grad(), _kept_buffers(model):
            losses.append(_loss(model, last))
        print_log(
            f"Calibrated the batch norms of {layers} warm-started layers on {seen} batches; the "
            f"loss of the last is {losses[-1]:.4f} now, and {losses[-2]:.4f} as the plain "
            "convolutions compute",
            logger="current",
        )


def _loss(model: BaseModel, data: dict) -> float:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # samplers of boxes draw the same in both runs
        losses = model(**data, mode="loss")
    return float(model.parse_losses(losses)[0])


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in kept:
            buffer.copy_(value)
            setattr(module, name, buffer)  # where it was not changed in place


def uncalibrated(model: nn.Module) -> dict[str, ReceptiveFieldConv]:
    """Return the layers whose norm is the identity on running statistics, but uses batches.

    Args:
        model (nn.Module): In the mode in which it will run.

    Returns:
        dict[str, ReceptiveFieldConv]: By name.
    """
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, ReceptiveFieldConv)
        and layer.norm.training
        and is_uncalibrated(layer.norm, layer.input_floor)
    }


@torch.no_grad()
def calibrate(model: nn.Module, runs: Iterable[Callable]) -> tuple[int, int]:
    """Run a model, which computes what the plain one does meanwhile, and set norms by what is seen.

    Args:
        model (nn.Module): In training mode; nothing but the norms of :func:`uncalibrated` layers
            changes. Over several processes, statistics are averaged.
        runs (Iterable[Callable]): Each runs the model on a batch.

    Returns:
        tuple[int, int]: Numbers of layers and of batches.

    Example:
        >>> from rfa_mmdet.layers import RFAConv
        >>> plain, layer = nn.Conv2d(4, 4, 3), RFAConv(4, 4, 3, padding=0)
        >>> x = torch.rand(8, 4, 9, 9)
        >>> _ = layer.load_state_dict(plain.state_dict())
        >>> calibrate(layer, [lambda: layer(x)])
        (1, 1)
        >>> bool((layer.train()(x) - plain(x)).abs().max() < 1e-4)
        True
    """
    layers = uncalibrated(model)
    norms: dict[str, Any] = {name: layer.norm for name, layer in layers.items()}
    # (mean, variance, calls) by channel: a head runs its layers once for each level.
    sums = {
        name: norm.weight.new_zeros(3, norm.num_features, dtype=torch.float64)
        for name, norm in norms.items()
    }

    def watch(total: Tensor) -> Callable:
        def hook(norm: nn.Module, inputs: tuple[Tensor]) -> None:
            x = inputs[0].double()
            if x.numel():  # a batch may have no regions
                mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
                total.add_(torch.stack([mean, variance, torch.ones_like(mean)]))

        return hook

    handles = [norm.register_forward_pre_hook(watch(sums[name])) for name, norm in norms.items()]
    seen = 0
    try:
        with _kept_buffers(model):
            for norm in norms.values():
                norm.eval()
            for run in runs:
                run()
                seen += 1
    finally:
        for handle in handles:
            handle.remove()
        for norm in norms.values():
            norm.train()
    for name, norm in norms.items():
        # In every process, also in one whose batches did not reach the layer.
        all_reduce(sums[name], op="sum")
        mean, variance, calls = sums[name]
        if calls.any():
            mean, variance = ((v / calls).to(norm.weight.dtype) for v in (mean, variance))
            calibrate_norm(norm, mean, variance, layers[name].input_floor)
    return len(layers), seen
