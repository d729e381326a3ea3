"""Process groups on machines without CUDA.

MMEngine's launchers call ``torch.cuda.set_device``. Where there is no CUDA, the gloo group has to
exist before the Runner is made, which then leaves it alone.
"""

import os
import subprocess

import torch
from mmengine.config import Config
from torch import distributed as dist

from rfa_mmdet.errors import ConfigError

# launcher -> the variables in which it tells each process its place
_PLACES = {
    "pytorch": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODELIST"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}


def launched_rank(launcher: str) -> int:
    """Return the rank that ``launcher`` gave this process, before any group exists.

    Args:
        launcher (str): 'none', 'pytorch', 'slurm' or 'mpi'.

    Raises:
        ConfigError: The launcher did not start this process.

    Example:
        >>> launched_rank("none")
        0
    """
    if launcher == "none":
        return 0
    missing = [name for name in _PLACES[launcher] if name not in os.environ]
    if missing:
        raise ConfigError(
            f"--launcher {launcher}: {', '.join(missing)} not set, so {launcher} has not started "
            "this process; use tools/dist_train.sh, tools/slurm_train.sh or mpirun"
        )
    return int(os.environ[_PLACES[launcher][0]])


def prepare_cpu_group(cfg: Config) -> None:
    """Make the gloo group of a distributed run without CUDA, and have the Runner use it.

    With CUDA, or without a launcher, nothing is done.

    Args:
        cfg (Config): Of the run; ``cfg.launcher`` is read, ``model_wrapper_cfg`` set.

    Raises:
        ConfigError: The launcher did not start this process.
    """
    if cfg.launcher == "none" or torch.cuda.is_available():
        return
    launched_rank(cfg.launcher)
    # Rank, world size and local rank come first for each.
    for name, source in zip(_PLACES["pytorch"], _PLACES[cfg.launcher], strict=False):
        os.environ[name] = os.environ[source]
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_host(cfg.launcher)
    os.environ.setdefault("MASTER_PORT", "29500")
    dist.init_process_group("gloo")
    # Other than on a GPU, DDP must not be told a device.
    wrapper = dict(
        type="MMDistributedDataParallel",
        broadcast_buffers=False,
        find_unused_parameters=cfg.get("find_unused_parameters", False),
        device_ids=None,
    )
    cfg.model_wrapper_cfg = {**wrapper, **cfg.get("model_wrapper_cfg", {})}


def _first_host(launcher: str) -> str:
    if launcher != "slurm":
        return "127.0.0.1"  # several machines: the user gives MASTER_ADDR
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_NODELIST"]]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
