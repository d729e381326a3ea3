"""All runs as arrays of Slurm: one a stage, and a last job that writes the report."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole
from rfa_mmdet.studies.folders import Folder
from rfa_mmdet.studies.spec import Spec


def submit(
    spec: Spec,
    work_dir: str | os.PathLike,
    command: Sequence[str],
    partition: str,
    jobs: int | None = None,
    arguments: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
    """Write a script for each stage and one for the report, and submit them where Slurm is.

    A stage begins when the one before has ended, whatever became of its runs: those that need a
    failed one fail themselves, and say why.

    Args:
        spec (Spec): What is compared.
        work_dir (str | os.PathLike): Where to write; must be seen by the nodes.
        command (Sequence[str]): tools/ablate.py with the arguments that every job has.
        partition (str): Of Slurm.
        jobs (int | None): Runs at a time. Defaults to None: as many as Slurm likes.
        arguments (Sequence[str]): More of sbatch's, such as '--gres=gpu:1'.

    Returns:
        tuple[list[str], list[str]]: The scripts in order, and the jobs' numbers; none where there
        is no sbatch.

    Raises:
        UserError: sbatch refuses a script.
    """
    folder = Path(work_dir, "slurm").resolve()
    runs = spec.runs()
    scripts = []
    for stage in spec.stages:
        left = [i for i, r in enumerate(runs) if r.stage == stage.name and not _done(work_dir, r)]
        if left:
            array = ",".join(map(str, left)) + (f"%{jobs}" if jobs else "")
            lines = [f"#SBATCH --array={array}", f"#SBATCH --job-name={spec.name}-{stage.name}"]
            call = [sys.executable, *command, "--run"]
            scripts.append((stage.name, lines, f'{shlex.join(call)} "$SLURM_ARRAY_TASK_ID"'))
    call = shlex.join([sys.executable, *command, "--report-only"])
    scripts.append(("report", [f"#SBATCH --job-name={spec.name}-report"], call))
    for old in folder.glob("*.sh"):
        old.unlink()
    paths = []
    for i, (name, lines, call) in enumerate(scripts, 1):
        log = "%A_%a.txt" if name != "report" else "%j.txt"
        head = [
            "#!/usr/bin/env bash",
            f"#SBATCH --partition={partition}",
            f"#SBATCH --output={folder}/{name}-{log}",
            *lines,
            *(f"#SBATCH {argument}" for argument in arguments),
            "",
            f"cd {shlex.quote(os.getcwd())}",
        ]
        path = folder / f"{i}_{name}.sh"
        with written_whole(path) as part:
            part.write_text("\n".join([*head, call, ""]), encoding="utf-8")
        paths.append(str(path))
    return paths, _send(paths) if shutil.which("sbatch") else []


def _done(work_dir: str | os.PathLike, run) -> bool:
    return Folder(work_dir, run).finished


def _send(scripts: list[str]) -> list[str]:
    numbers: list[str] = []
    for script in scripts:
        after = [f"--dependency=afterany:{numbers[-1]}"] if numbers else []
        done = subprocess.run(
            ["sbatch", "--parsable", *after, script], capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(f"sbatch {script}: {done.stderr.strip() or done.returncode}")
        numbers.append(done.stdout.strip().split(";")[0])
    return numbers
