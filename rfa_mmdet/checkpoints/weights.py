"""Weights that must be a model's own."""

from torch import nn

from rfa_mmdet.errors import UserError


def load_weights(model: nn.Module, checkpoint: dict, name: str) -> None:
    """Load a checkpoint into the model that it was saved from.

    MMEngine only logs what does not fit, and keeps random weights there.

    Args:
        model (nn.Module): Takes the weights.
        checkpoint (dict): As :func:`~rfa_mmdet.checkpoints.files.read_checkpoint` returns it.
        name (str): Of the file, for the error.

    Raises:
        UserError: It has other parameters than the model.

    Example:
        >>> load_weights(nn.Linear(2, 3), nn.Linear(2, 4).state_dict(), "a.pth")
        Traceback (most recent call last):
        rfa_mmdet.errors.UserError: checkpoint='a.pth' is of another model...
    """
    state = checkpoint.get("state_dict", checkpoint)
    try:
        result = model.load_state_dict(state, strict=False)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        first, more = lines[min(1, len(lines) - 1)], len(lines) - 2
        raise UserError(
            f"checkpoint={name!r} is of another model than the config: {first}"
            f"{f' (and {more} more)' if more > 0 else ''}"
        ) from error
    # Old checkpoints do not count batches.
    missing = [k for k in result.missing_keys if not k.endswith("num_batches_tracked")]
    if missing or result.unexpected_keys:
        parts = [
            f"{len(keys)} parameters {what}, such as {keys[0]}"
            for keys, what in (
                (missing, "of the config's model are not in it"),
                (result.unexpected_keys, "in it are not the model's"),
            )
            if keys
        ]
        raise UserError(
            f"checkpoint={name!r} is of another model than the config: {'; '.join(parts)}"
        )
