"""Select and check what a Runner needs from a checkpoint to resume.

MMEngine trusts checkpoints: it executes ``meta['config']``, overwrites the run's own
``message_hub``, replaces attributes of schedulers, and removes the files that the checkpoint names
as the best and the oldest.
"""

import re
from typing import Any

import numpy as np
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor

from rfa_mmdet.checkpoints.contents import (
    alike,
    require_dict,
    require_names,
    shape_of,
    such_as,
)
from rfa_mmdet.checkpoints.optimizer_states import check_optimizers
from rfa_mmdet.checkpoints.unpickler import Damaged

# Every run sets these itself; another run's config would end up in this run's checkpoints.
_OWN_INFO = re.compile(
    "cfg|experiment_name|mmengine_version|last_ckpt|dataset_meta|loop_stage|eta|epoch|iter"
    "|max_epochs|max_iters|(val|test)/.*"
)


def taken_up(content: dict, runner: Any, optimizer: bool = True, schedules: bool = True) -> dict:
    """Return the parts of a checkpoint that a run resumes from.

    Args:
        content (dict): The file's content.
        runner (Any): The Runner, with its initial model, optimizer and schedulers.
        optimizer (bool): Whether to resume the optimizer. Defaults to True.
        schedules (bool): Whether to resume the schedulers. Defaults to True.

    Returns:
        dict: The content, with the parts that must not be resumed removed.

    Raises:
        Damaged: A part is missing, or does not fit this run.
    """
    here = isinstance(runner, Runner)  # a FlexibleRunner may only have a part of the model
    if here:  # resume would do this later
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        if runner.param_schedulers is not None:
            runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    own_schedules = _by_optimizer(runner.param_schedulers or [])
    wanted = ["meta", "message_hub", "state_dict"]
    wanted += ["optimizer"] * optimizer + ["param_schedulers"] * (
        schedules and any(own_schedules.values())
    )
    missing = [part for part in wanted if content.get(part) is None]
    if missing:
        raise Damaged(
            f"has no {' and no '.join(missing)}, so it cannot be resumed from; best_*.pth only has "
            "weights, epoch_*.pth has everything; use load_from to load only the weights"
        )
    meta = {key: value for key, value in content["meta"].items() if key != "config"}
    _check_progress(meta, runner)
    if here:
        _check_model(content, runner.model)
    if here and optimizer:
        check_optimizers(content["optimizer"], runner.optim_wrapper)
    if schedules:
        _check_schedules(content.get("param_schedulers"), own_schedules)
    return {**content, "meta": meta, "message_hub": _hub(content["message_hub"])}


def _check_progress(meta: dict, runner: Any) -> None:
    by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
    # With epochs, the batch size may have changed. With iterations, MMEngine skips batch by batch.
    for key, most in (
        ("epoch", runner.max_epochs),
        ("iter", None if by_epoch else runner.max_iters),
    ):
        done = meta.get(key)
        if not isinstance(done, (int, np.integer)) or not 0 <= done < 2**62:
            raise Damaged(f"its meta has {key}={done!r}; must be a non-negative integer")
        if most and done > most:
            raise Damaged(
                f"was saved at {key} {done}, beyond the config's train_cfg.max_{key}s={most}"
            )
    seed = meta.get("seed", 0)
    if seed is not None and not (isinstance(seed, (int, np.integer)) and 0 <= seed < 2**32):
        raise Damaged(f"its meta has seed={seed!r}; must be from 0 to {2**32 - 1}")


def _hub(hub: Any) -> dict:
    """Return MMEngine's log history, and the entries that hooks added about the run."""
    hub = require_dict(hub, "its message_hub")
    scalars, info, resumed = (
        require_names(hub.get(part), f"its message_hub[{part!r}]")
        for part in ("log_scalars", "runtime_info", "resumed_keys")
    )
    scalars = {
        key: value
        for key, value in scalars.items()
        if isinstance(value, HistoryBuffer) and len(value.data[0])  # empty ones break logging
    }
    info = {key: value for key, value in info.items() if not _OWN_INFO.fullmatch(key)}
    # MMEngine warns about keys without a value, and fails on False once this run sets the key.
    kept = scalars.keys() | info.keys()
    resumed = {key: True for key, value in resumed.items() if value is True and key in kept}
    return dict(log_scalars=scalars, runtime_info=info, resumed_keys=resumed)


def _check_model(content: dict, model: Any) -> None:
    model = model.module if is_model_wrapper(model) else model
    given = {key.removeprefix("module."): value for key, value in content["state_dict"].items()}
    own = model.state_dict()
    missing = [k for k, p in model.named_parameters() if p.requires_grad and k not in given]
    if missing:
        raise Damaged(f"does not fit the config's model: missing {such_as(missing)}")
    other = [
        f"{key} ({shape_of(given[key])}, model: {shape_of(value)})"
        for key, value in own.items()
        if isinstance(value, Tensor) and key in given and shape_of(given[key]) != shape_of(value)
    ]
    if other:
        raise Damaged(f"does not fit the config's model: these shapes differ: {such_as(other)}")
    averaged = content.get("ema_state_dict")
    if averaged is not None:
        names = require_names(averaged, "its ema_state_dict")
        own_names = {f"module.{key}" for key in content["state_dict"]}
        odd = [key for key in names if key.startswith("module.") and key not in own_names]
        if odd:
            raise Damaged(f"its ema_state_dict has keys without weights: {such_as(odd)}")
        shapes = {"steps": (), **{f"module.{key}": shape_of(value) for key, value in given.items()}}
        odd = [k for k, v in averaged.items() if k in shapes and shape_of(v) != shapes[k]]
        if odd:
            raise Damaged(f"its ema_state_dict differs in shape from its weights: {such_as(odd)}")


def _by_optimizer(found: Any) -> dict:
    """Return schedulers or their states by optimizer name, which is None for a single one."""
    return found if isinstance(found, dict) else {None: found}


def _check_schedules(states: Any, own: dict[str | None, list]) -> None:
    given = _by_optimizer(states)
    for name, schedulers in own.items():
        what = "its param_schedulers" + (f"[{name!r}]" if name else "")
        states = given.get(name)
        if not schedulers:
            continue
        if not isinstance(states, list):
            raise Damaged(f"{what} is a {type(states).__name__}, not a list")
        if len(states) != len(schedulers):
            print_log(
                f"{what} has {len(states)} schedulers, but the config has {len(schedulers)}: "
                "resuming them pairwise, in the config's order",
                logger="current",
                level=30,
            )
        for scheduler, state in zip(schedulers, states, strict=False):
            kind = type(scheduler).__name__
            like = {key: value for key, value in vars(scheduler).items() if key != "optimizer"}
            for key, value in require_dict(state, what).items():
                fits = key in like and alike(value, like[key])
                if not fits or (key == "param_name" and value != like[key]):
                    raise Damaged(f"{what} does not fit the config's {kind}: {key!r} is {value!r}")
