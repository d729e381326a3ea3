"""A Slurm cluster of two nodes on this machine, until SIGTERM or the end of standard input.

Standard input ends with the process that started this one, even if that is killed. Prints the
cluster's folder, which contains slurm.conf, once jobs can start. Needs no special permissions.
"""

import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.helpers.ports import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
START = 60  # seconds; it takes two
NODES = ("rfa1", "rfa2")
PR_SET_CHILD_SUBREAPER = 36

CONF = """
ClusterName=rfa
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A job that is queued again waits until its old credential has expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
PropagateResourceLimits=NONE
GresTypes=gpu
KillWait=5
ReturnToService=2
# CPUs are as many as the configuration says.
SlurmdParameters=config_overrides
PartitionName=part Nodes=ALL State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=16 Gres=gpu:2\n"
# Slurm accepts any character device as a GPU.
GPUS = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"


def configure(folder: Path) -> None:
    host = socket.gethostname().split(".")[0]
    conf = CONF.format(folder=folder, host=host, port=free_port(), user=os.getuid())
    conf += "".join(NODE.format(name=name, host=host, port=free_port()) for name in NODES)
    (folder / "slurm.conf").write_text(conf)
    (folder / "gres.conf").write_text(GPUS)
    (folder / "cgroup.conf").touch()
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))


def commands(folder: Path) -> dict[str, list[str]]:
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid",
             "seed-file": "munged.seed", "log-file": "munged.log"}  # fmt: skip
    # The name of this machine may have no address.
    munged = ["munged", "--foreground", "--force", "--origin=127.0.0.1"]
    return {
        "munged": munged + [f"--{option}={folder / file}" for option, file in files.items()],
        "slurmctld": ["slurmctld", "-D"],
        **{name: ["slurmd", "-D", "-N", name] for name in NODES},
    }


def start(folder: Path) -> None:
    """Start the daemons and wait until both nodes are idle."""
    configure(folder)
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
    variables.update(PATH=PATH, SLURM_CONF=str(folder / "slurm.conf"))
    own = dict(cwd=folder, env=variables, stdin=subprocess.DEVNULL)
    running = {}
    for name, command in commands(folder).items():
        with open(folder / f"{name}.out", "wb") as out:
            running[name] = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, **own)
    until = time.monotonic() + START
    states: list[str] = []
    while states != ["idle"] * len(NODES):
        ended = [name for name, process in running.items() if process.poll() is not None]
        if ended or time.monotonic() > until:
            said = "".join(file.read_text() for file in sorted(folder.glob("*.out")))
            sys.exit(f"{' '.join(ended) or 'no daemon'} ended, nodes are {states}:\n{said}")
        time.sleep(0.1)
        command = ["sinfo", "--noheader", "--Node", "--format=%T"]
        states = subprocess.run(command, capture_output=True, text=True, **own).stdout.split()


def end_all() -> None:
    """Stop the daemons, the jobs, and their leftover processes."""
    while True:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not ended:  # psutil misses children if the system's clock is set meanwhile
            time.sleep(0.01)


def main() -> None:
    # Slurm's step daemons detach; they become children of this process rather than of init.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # Not in a test's folder: socket paths must be shorter than 108 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        start(folder)
        print(folder, flush=True)
        sys.stdin.read()
    finally:
        end_all()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
