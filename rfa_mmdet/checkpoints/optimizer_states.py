"""Check that an optimizer state fits this run's optimizer, in its settings and shapes.

torch only compares the number of parameters, and loads settings and states unchecked.
"""

from collections import defaultdict
from typing import Any

import torch
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import nn
from torch.optim import Optimizer

from rfa_mmdet.checkpoints.contents import alike, is_number, require_dict, shape_of, such_as
from rfa_mmdet.checkpoints.unpickler import Damaged

_TRIED = (2, 3)  # shape of the parameter that an optimizer is tried on


def check_optimizers(state: Any, wrapper: Any) -> None:
    """Check that optimizer states belong to this run's optimizers.

    Args:
        state (Any): The state from the file.
        wrapper (Any): MMEngine's wrapper of one or several optimizers.

    Raises:
        Damaged: The state does not fit.
    """
    if isinstance(wrapper, OptimWrapperDict):
        if set(require_dict(state, "its optimizer")) != set(wrapper.keys()):
            own = ", ".join(wrapper.keys())
            raise Damaged(
                f"its optimizer state is for {such_as(list(state))}, but the config has {own}"
            )
        for name, one in wrapper.items():
            _check_optimizer(state[name], one, f"its optimizer[{name!r}]")
    elif isinstance(wrapper, OptimWrapper):
        _check_optimizer(state, wrapper, "its optimizer")


def _check_optimizer(state: Any, wrapper: OptimWrapper, what: str) -> None:
    optimizer = wrapper.optimizer
    groups = require_dict(state, what).get("param_groups")
    if not isinstance(groups, list):
        raise Damaged(f"{what} has no list of param_groups")
    for group in groups:
        params = require_dict(group, f"{what}.param_groups").get("params")
        if not isinstance(params, list) or not all(type(i) is int for i in params):
            raise Damaged(f"{what}.param_groups have params={params!r}, not a list of integers")
    sizes = [len(group["params"]) for group in groups]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != own:
        raise Damaged(
            f"{what} has {sum(sizes)} parameters in {len(sizes)} groups, which does not match the "
            f"{sum(own)} parameters in {len(own)} groups of the config's "
            f"{type(optimizer).__name__}"
        )
    entries = require_dict(state.get("state"), f"{what}.state")
    ids = [i for group in groups for i in group["params"]]
    of_id = dict(zip(ids, (p for g in optimizer.param_groups for p in g["params"]), strict=True))
    unknown = [key for key in entries if key not in of_id]
    if unknown:
        raise Damaged(f"{what}.state has the key {unknown[0]!r}, which is not in its param_groups")
    for group, given in zip(optimizer.param_groups, groups, strict=True):
        _check_step(optimizer, group, given, entries, of_id, what)
    settings = state.get("base_param_settings")
    if settings is not None and "lr" not in require_dict(settings, f"{what}.base_param_settings"):
        raise Damaged(f"{what}.base_param_settings has no lr")
    scaler = getattr(wrapper, "loss_scaler", None)
    if scaler is not None and scaler.is_enabled() and "loss_scaler" in state:
        scale = require_dict(state["loss_scaler"], f"{what}.loss_scaler")
        fits = set(scale) == set(scaler.state_dict()) and all(is_number(v) for v in scale.values())
        if scale and not fits:
            raise Damaged(f"{what}.loss_scaler is not the state of a GradScaler")
        if not scale:  # from a run without loss scaling; torch refuses to load it
            del state["loss_scaler"]


def _check_step(
    optimizer: Optimizer, group: dict, given: dict, entries: dict, of_id: dict, what: str
) -> None:
    """Check that this optimizer can step with a group, and that the states are its own."""
    try:
        _step(optimizer, group)
    except Exception:  # the optimizer cannot be tried on its own
        return
    kind = type(optimizer).__name__
    for key in group:
        if key in given and key != "params" and not alike(given[key], group[key]):
            raise Damaged(f"{what} does not fit the config's {kind}: {key!r} is {given[key]!r}")
    try:
        kept = _step(optimizer, given)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise Damaged(f"{what} does not fit the config's {kind}: {reason}") from error
    if kept and not entries:
        raise Damaged(f"{what}.state is empty, but the config's {kind} needs {', '.join(kept)}")
    for i in given["params"]:
        entry = require_dict(entries.get(i, {}), f"{what}.state[{i}]")
        for key, like in kept.items() if entry else ():
            if key not in entry:
                raise Damaged(f"{what} does not fit the config's {kind}: it has no {key}")
            value, shape = entry[key], shape_of(like)
            if shape == _TRIED:
                shape = shape_of(of_id[i])
            elif shape != ():
                continue  # its shape may differ
            if not (shape_of(value) == shape if shape else is_number(value)):
                odd = f"{what}.state[{i}][{key!r}] is {shape_of(value)}"
                raise Damaged(f"{odd}, but its parameter is {shape_of(of_id[i])}")


def _step(optimizer: Optimizer, group: dict) -> dict:
    """Take one step with the settings of a group, and return the optimizer's state after it."""
    like = optimizer.param_groups[0]["params"][0]
    parameter = nn.Parameter(torch.zeros(_TRIED, dtype=like.dtype, device=like.device))
    parameter.grad = torch.zeros_like(parameter)
    tried = type(optimizer).__new__(type(optimizer))
    groups = [{**group, "params": [parameter]}]
    tried.__setstate__(
        dict(defaults=dict(optimizer.defaults), state=defaultdict(dict), param_groups=groups)
    )
    tried.step()
    return {key: value for key, value in tried.state[parameter].items() if value is not None}
