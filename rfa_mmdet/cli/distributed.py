"""Rendezvous of a run's processes, and their process group on machines without CUDA.

MMEngine's launchers call ``torch.cuda.set_device``. Without CUDA, we create a gloo group before the
Runner is built, and the Runner then uses that one.
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

# launcher -> the variables that give each process its place; the last ones identify the job.
_PLACES = {
    "pytorch": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    # A batch script, which is not a Slurm task, has a SLURM_PROCID too, but no step.
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
# Below the ephemeral ports.
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
            f"--launcher {launcher}: {', '.join(missing)} not set: this process was not started "
            f"by {launcher}; use tools/dist_train.sh, tools/slurm_train.sh or mpirun"
        )
    return int(os.environ[_PLACES[launcher][0]])


def prepare_group(cfg: Config) -> None:
    """Set the rendezvous of a run's processes and, without CUDA, create their process group.

    Does nothing without a launcher.

    Args:
        cfg (Config): The run's config; reads ``cfg.launcher``, sets ``cfg.model_wrapper_cfg``.

    Raises:
        ConfigError: The launcher did not start this process, or the rendezvous failed.
    """
    if cfg.launcher == "none":
        return
    rank = launched_rank(cfg.launcher)
    if cfg.launcher != "pytorch":
        _set_meeting_place(cfg.launcher, rank)
    if torch.cuda.is_available():
        return
    # Rank, world size and local rank come first for every launcher.
    for name, source in zip(_PLACES["pytorch"], _PLACES[cfg.launcher], strict=False):
        os.environ[name] = os.environ[source]
    dist.init_process_group("gloo")
    # Without a GPU, DDP must not get a device.
    wrapper = dict(
        type="MMDistributedDataParallel",
        broadcast_buffers=False,
        find_unused_parameters=cfg.get("find_unused_parameters", False),
        device_ids=None,
    )
    cfg.model_wrapper_cfg = {**wrapper, **cfg.get("model_wrapper_cfg", {})}


def _set_meeting_place(launcher: str, rank: int) -> None:
    """Set MASTER_ADDR and MASTER_PORT unless the user did."""
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_host(launcher)
    # Jobs may share a node, so each gets its own port, which all its processes can derive.
    names = dict(slurm=("SLURM_JOB_ID", "SLURM_STEP_ID"), mpi=("PMIX_NAMESPACE",))[launcher]
    job = ".".join(os.environ.get(name, "") for name in names)
    port = os.environ.setdefault("MASTER_PORT", str(_PORTS[zlib.crc32(job.encode()) % len(_PORTS)]))
    if rank == 0:
        try:
            socket.create_server(("", int(port))).close()
        except (OSError, OverflowError, ValueError) as error:
            raise ConfigError(
                f"MASTER_PORT={port}: cannot listen on this port ({error}); set it to a free port "
                f"of {os.environ['MASTER_ADDR']}"
            ) from error


def _first_host(launcher: str) -> str:
    """Return the address of the machine that rank 0 runs on."""
    if launcher == "mpi":
        if os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") != os.environ["OMPI_COMM_WORLD_SIZE"]:
            raise ConfigError(
                "MASTER_ADDR: not set; on several machines, call mpirun with "
                "-x MASTER_ADDR=<address of the first machine>"
            )
        return "127.0.0.1"
    if os.environ.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_NODELIST"]
    name = _scontrol("hostnames", nodes).split()[0]
    try:
        socket.getaddrinfo(name, None)
    except socket.gaierror:  # only Slurm knows this name
        return re.findall(r"NodeAddr=(\S+)", _scontrol("node", name))[0]
    return name


def _scontrol(what: str, name: str) -> str:
    """Return the output of ``scontrol show`` for some nodes."""
    command = ["scontrol", "show", what, name]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"MASTER_ADDR: not set, and `{' '.join(command)}` failed ({error}); set it to the "
            "address of the job's first node"
        ) from error
