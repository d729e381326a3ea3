"""Where the processes of a run meet, and their group on machines without CUDA.

MMEngine's launchers call ``torch.cuda.set_device``. Where there is no CUDA, the gloo group has to
exist before the Runner is made, which then leaves it alone.
"""

import os
import re
import socket
import subprocess
import zlib

import torch
from mmengine.config import Config
from torch import distributed as dist

from rfa_mmdet.errors import ConfigError

# launcher -> the variables in which it tells each process its place; the last ones tell its job.
_PLACES = {
    "pytorch": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    # A batch script, which is no task of Slurm's, has a SLURM_PROCID as well, but no step.
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
# Below the ports that systems hand out by themselves.
_PORTS = range(20_000, 32_000)


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


def prepare_group(cfg: Config) -> None:
    """Say where the processes of a run meet; without CUDA, make their group and have it used.

    Without a launcher, nothing is done.

    Args:
        cfg (Config): Of the run; ``cfg.launcher`` is read, ``model_wrapper_cfg`` set.

    Raises:
        ConfigError: The launcher did not start this process, or they cannot meet.
    """
    if cfg.launcher == "none":
        return
    rank = launched_rank(cfg.launcher)
    if cfg.launcher != "pytorch":
        _set_meeting_place(cfg.launcher, rank)
    if torch.cuda.is_available():
        return
    # Rank, world size and local rank come first for each.
    for name, source in zip(_PLACES["pytorch"], _PLACES[cfg.launcher], strict=False):
        os.environ[name] = os.environ[source]
    dist.init_process_group("gloo")
    # Other than on a GPU, DDP must not be told a device.
    wrapper = dict(
        type="MMDistributedDataParallel",
        broadcast_buffers=False,
        find_unused_parameters=cfg.get("find_unused_parameters", False),
        device_ids=None,
    )
    cfg.model_wrapper_cfg = {**wrapper, **cfg.get("model_wrapper_cfg", {})}


def _set_meeting_place(launcher: str, rank: int) -> None:
    """Set MASTER_ADDR and MASTER_PORT, unless the user has."""
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_host(launcher)
    # Jobs may share a node: each has a port of its own, which all of its processes know.
    names = dict(slurm=("SLURM_JOB_ID", "SLURM_STEP_ID"), mpi=("PMIX_NAMESPACE",))[launcher]
    job = ".".join(os.environ.get(name, "") for name in names)
    port = os.environ.setdefault("MASTER_PORT", str(_PORTS[zlib.crc32(job.encode()) % len(_PORTS)]))
    if rank == 0:
        try:
            socket.create_server(("", int(port))).close()
        except (OSError, OverflowError, ValueError) as error:
            raise ConfigError(
                f"MASTER_PORT={port}: the processes cannot meet there ({error}); set it to a port "
                f"that is free on {os.environ['MASTER_ADDR']}"
            ) from error


def _first_host(launcher: str) -> str:
    """Return the address of the machine that rank 0 runs on."""
    if launcher == "mpi":
        if os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") != os.environ["OMPI_COMM_WORLD_SIZE"]:
            raise ConfigError(
                "MASTER_ADDR: not set; on several machines, mpirun needs "
                "-x MASTER_ADDR=<address of the first one>"
            )
        return "127.0.0.1"
    if os.environ.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_NODELIST"]
    name = _scontrol("hostnames", nodes).split()[0]
    try:
        socket.getaddrinfo(name, None)
    except socket.gaierror:  # a name that only Slurm knows
        return re.findall(r"NodeAddr=(\S+)", _scontrol("node", name))[0]
    return name


def _scontrol(what: str, name: str) -> str:
    """Return what Slurm says of some nodes."""
    command = ["scontrol", "show", what, name]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"MASTER_ADDR: not set, and {' '.join(command)} does not tell it ({error}); set it to "
            "the address of the job's first node"
        ) from error
