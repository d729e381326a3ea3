"""Load weights that must match the model, completely or in part.

MMEngine only logs the names of mismatched parameters, and keeps their random values.
"""

import logging
import re
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop, Runner, find_latest_checkpoint
from torch import Tensor, nn

from rfa_mmdet.checkpoints.files import read_checkpoint
from rfa_mmdet.errors import UserError
from rfa_mmdet.layers.warm_start.start import WarmStartError


def bare(model: nn.Module) -> Any:
    """Return the model inside a wrapper such as DDP, or the model itself."""
    return model.module if is_model_wrapper(model) else model


def state_of(checkpoint: dict, name: str) -> dict[str, Tensor]:
    """Return a checkpoint's state dict, without DDP's prefix of the names.

    Args:
        checkpoint (dict): Returned by :func:`~rfa_mmdet.checkpoints.files.read_checkpoint`.
        name (str): Name of the file, for the error.

    Raises:
        UserError: The checkpoint contains no weights.

    Example:
        >>> import torch
        >>> list(state_of(dict(state_dict={"module.weight": torch.ones(1)}), "a.pth"))
        ['weight']
    """
    state = checkpoint.get("state_dict", checkpoint)
    named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not named or not any(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"checkpoint={name!r} contains no model weights")
    # The metadata has DDP's own entry, '', and the model's, 'module'.
    metadata = {re.sub(r"^module(\.|$)", "", key): v for key, v in _metadata(state).items()}
    return _with_metadata(((re.sub(r"^module\.", "", k), state[k]) for k in state), metadata)


def _metadata(state: dict) -> dict[str, Any]:
    """Return the metadata of a state dict, which has module versions and more."""
    return getattr(state, "_metadata", {})


def _with_metadata(
    items: Iterable[tuple[str, Tensor]], metadata: dict[str, Any]
) -> dict[str, Tensor]:
    found = OrderedDict(items)
    found._metadata = metadata  # type: ignore[attr-defined]
    return found


def load_weights(model: nn.Module, checkpoint: dict, name: str) -> None:
    """Load a checkpoint into the model that it was saved from.

    Args:
        model (nn.Module): The model.
        checkpoint (dict): Returned by :func:`~rfa_mmdet.checkpoints.files.read_checkpoint`.
        name (str): Name of the file, for the error.

    Raises:
        UserError: The parameters do not match the model.

    Example:
        >>> load_weights(nn.Linear(2, 3), nn.Linear(2, 4).state_dict(), "a.pth")
        Traceback (most recent call last):
        rfa_mmdet.errors.UserError: checkpoint='a.pth' does not fit the config's model...
    """
    state = state_of(checkpoint, name)
    # MMDetection 2.x kept averaged weights as buffers, swapped with the weights.
    averages = {f"ema_{key.replace('.', '_')}" for key in model.state_dict()}
    items = (item for item in state.items() if item[0] not in averages)
    state = _with_metadata(items, _metadata(state))
    try:
        result = model.load_state_dict(state, strict=False)
    except WarmStartError as error:
        raise UserError(f"checkpoint={name!r} does not fit the config's model: {error}") from error
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        first, more = lines[min(1, len(lines) - 1)], len(lines) - 2
        raise UserError(
            f"checkpoint={name!r} does not fit the config's model: {first}"
            f"{f' (and {more} more)' if more > 0 else ''}"
        ) from error
    if difference := _difference(result.missing_keys, result.unexpected_keys):
        raise UserError(f"checkpoint={name!r} does not fit the config's model: {difference}")


def _difference(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """Describe which names differ, if any."""
    # Old checkpoints do not count batches, but have the constants of transformers' models.
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    unexpected = [key for key in unexpected if not key.endswith(".position_ids")]
    parts = [
        f"{len(keys)} parameters are {what}, e.g. {keys[0]}"
        for keys, what in (
            (missing, "missing in the checkpoint"),
            (unexpected, "not in the model"),
        )
        if keys
    ]
    return "; ".join(parts)


class OwnWeightsRunner(Runner):
    """MMEngine's Runner for testing, which only loads checkpoints that match its model."""

    def load_checkpoint(
        self, filename: str, map_location: Any = "cpu", *args: Any, **kwargs: Any
    ) -> dict:
        """Load a checkpoint with :func:`load_weights`, after the hooks, as in the base class.

        Raises:
            UserError: The checkpoint is missing, damaged, or does not match the model.
        """
        checkpoint = read_checkpoint(filename)
        state = state_of(checkpoint, filename)
        checkpoint = {**checkpoint, "state_dict": state}  # the file may be a bare state dict
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        model = bare(self.model)
        model = model.module if isinstance(model, BaseTTAModel) else model
        load_weights(model, checkpoint, filename)
        self.logger.info(f"Load checkpoint from {filename}")
        return checkpoint


class StartHook(Hook):
    """Checks the checkpoint that a training starts from, and warns if little of it is used.

    Raises:
        UserError: The checkpoint has none of the model's parameters.
    """

    priority = "HIGHEST"

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check the checkpoint before it is loaded, and before other hooks."""
        name = str(runner._load_from or find_latest_checkpoint(runner.work_dir))
        state = state_of(checkpoint, name)
        checkpoint["state_dict"] = state  # the file may be a bare state dict
        own = bare(runner.model).state_dict()
        fit = [key for key in own if key in state and _shape(state[key]) == _shape(own[key])]
        if not fit:
            raise UserError(
                f"load_from={name!r} does not fit the config's model: none of its {len(state)} "
                f"parameters (e.g. {next(iter(state))}) matches one of the model's {len(own)} "
                f"(e.g. {next(iter(own))}) by name and shape"
            )
        if runner._resume:
            _tell_resumed(runner, checkpoint, name)
        elif len(fit) < len(own) / 2:
            print_log(
                f"load_from={name!r} has only {len(fit)} of the model's {len(own)} parameters with "
                "the same name and shape; the others keep their initial values",
                logger="current",
                level=logging.WARNING,
            )


def _shape(value: Any) -> Any:
    return getattr(value, "shape", None)


def _tell_resumed(runner: Runner, checkpoint: dict, name: str) -> None:
    """Log that the config's optimizer and schedule have no effect."""
    unit = "epoch" if isinstance(runner.train_loop, EpochBasedTrainLoop) else "iter"
    most = getattr(runner, f"max_{unit}s")
    if checkpoint["meta"].get(unit) == most:
        print_log(
            f"--resume: {name} has already completed train_cfg.max_{unit}s={most}; nothing left to "
            "train",
            logger="current",
            level=logging.WARNING,
        )
    groups = (checkpoint["optimizer"].get("param_groups"), runner.optim_wrapper.param_groups)
    # With several optimizers, there is no single learning rate.
    theirs, ours = (
        g[0].get("initial_lr", g[0].get("lr")) if g and isinstance(g, list) else None
        for g in groups
    )
    print_log(
        "--resume: using the checkpoint's optimizer and schedule instead of the config's (learning "
        f"rate {theirs} instead of {ours}); to train its weights with the config's, replace "
        f"--resume by --cfg-options load_from={name}",
        logger="current",
        level=logging.INFO if theirs == ours else logging.WARNING,
    )
