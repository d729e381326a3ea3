"""Logs in the work dir of a training."""

from pathlib import Path

import pandas as pd
import torch


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=False)["state_dict"]


def losses(work_dir: Path) -> pd.Series:
    """Return training losses by iteration over all runs in a work dir; the last one wins."""
    logs = [
        pd.read_json(path, lines=True) for path in sorted(work_dir.glob("2*/vis_data/scalars.json"))
    ]
    log = pd.concat([one.dropna(subset=["loss"]) for one in logs])
    return log.groupby("step")["loss"].last()
