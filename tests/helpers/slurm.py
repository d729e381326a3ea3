"""Real Slurm for tests that need it; they are skipped if it is not installed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes import PATIENCE, wait_until
from tests.helpers.run_slurm import DAEMONS, PATH


@dataclass(frozen=True)
class Cluster:
    """Two pretended nodes with 16 CPUs and two GPUs each, in the partition 'part'."""

    environment: dict[str, str]

    def run(self, *command: object) -> str:
        """Run one of Slurm's commands; return its output."""
        line = [str(part) for part in command]
        environment = {**os.environ, **self.environment}
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def jobs(self) -> str:
        """Return the jobs that have not ended."""
        return self.run("squeue", "--noheader")

    def wait(self) -> None:
        """Wait until all jobs have ended."""
        wait_until(lambda: not self.jobs(), printed=self.jobs)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Return a cluster for this process."""
    missing = [name for name in DAEMONS if not shutil.which(name, path=PATH)]
    if missing:
        pytest.skip(f"{missing[0]} is not installed: apt-get install slurm-wlm munge")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.run_slurm"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the tests
    )
    folder = process.stdout.readline().strip()
    if not folder:
        pytest.fail(f"Slurm does not start: {process.communicate()[1]}")
    try:
        yield Cluster({"SLURM_CONF": str(Path(folder, "slurm.conf"))})
    finally:
        # Closing its stdin is not enough: a process forked meanwhile may hold it open.
        process.terminate()
        process.communicate(timeout=PATIENCE)
    assert not Path(folder).exists()
