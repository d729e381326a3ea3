"""Which layers are new: told to DDP before the first step, and remembered by checkpoints."""

from collections.abc import Iterator
from typing import Any

from mmengine.dist import is_distributed
from mmengine.hooks import Hook
from mmengine.model import BaseModel, is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

FILLED = "rfa_mmdet_filled"


def bare(model: nn.Module) -> BaseModel:
    """Return the model that a wrapper such as DDP holds, or the model itself."""
    return model.module if is_model_wrapper(model) else model


@HOOKS.register_module()
class NewLayersHook(Hook):
    """Keeps two promises that a module cannot keep by itself.

    A run that is resumed holds and freezes what the run before did, although its checkpoint fills
    everything: which of the new layers' names a checkpoint had filled is written into it.

    DDP takes the parameters that train when the model is wrapped, before any checkpoint is loaded.
    Where loading one freezes more, in ``frozen_stages``, the model is wrapped anew.

    ``tools/train.py`` adds it to every run. Without new layers it does nothing.

    Example:
        >>> custom_hooks = [dict(type="NewLayersHook")]
    """

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self._resumed: dict[str, list[str]] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Remember what the run before had found filled, if this is a resume."""
        if runner._resume:
            self._resumed = checkpoint.get("meta", {}).get(FILLED)

    def before_train(self, runner: Runner) -> None:
        """Settle what trains."""
        model = bare(runner.model)
        resumed, self._resumed = self._resumed or {}, None
        for prefix, new in _records(model):
            for name in new.layers:
                if prefix + name in resumed:
                    new.restore_start(name, resumed[prefix + name])
        before = [p.requires_grad for p in model.parameters()]
        model.train()
        changed = before != [p.requires_grad for p in model.parameters()]
        if changed and is_distributed() and is_model_wrapper(runner.model):
            runner.model = runner.wrap_model(runner.cfg.get("model_wrapper_cfg"), model)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Write down what a checkpoint had filled before this run trained it."""
        starts = {
            prefix + name: sorted(new.start_of(name).filled)
            for prefix, new in _records(bare(runner.model))
            for name in new.layers
        }
        if starts:
            checkpoint["meta"][FILLED] = starts


def new_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the full name and the layer, for each that Retrofit and its kin put into a model.

    Example:
        >>> list(new_layers(nn.Conv2d(3, 3, 3)))
        []
    """
    for prefix, new in _records(model):
        for name, layer in new.layers.items():
            yield prefix + name, layer


def _records(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the prefix of each module with new layers, and its record of them."""
    for name, module in model.named_modules():
        if hasattr(module, "new_layers"):
            yield f"{name}." if name else "", module.new_layers
