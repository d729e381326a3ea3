"""All runs as Slurm job arrays: one per stage, and a last job that writes the report."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole
from rfa_mmdet.studies.study import Study


def submit(
    study: Study,
    arguments: Sequence[str],
    partition: str,
    jobs: int | None = None,
    options: Sequence[str] = (),
) -> tuple[list[Path], list[str]]:
    """Write a script for each stage and one for the report, and submit them if Slurm is here.

    A stage starts when the one before has ended, even if runs of it failed: a run that needs a
    failed one fails and says so.

    Args:
        study (Study): What to compare; its work dir must be one that all nodes see.
        arguments (Sequence[str]): Of ``ablate``, common to all jobs.
        partition (str): Slurm's.
        jobs (int | None): Runs at a time. Defaults to None: no limit.
        options (Sequence[str]): More for sbatch, such as '--gres=gpu:1'.

    Returns:
        tuple[list[Path], list[str]]: The scripts in order, and their job IDs; none without sbatch.

    Raises:
        UserError: sbatch rejects a script, or a name that cannot stand in one.
    """
    folder = (study.work_dir / "slurm").resolve()
    if set("\\\n") & set(f"{study.name}{folder}"):
        raise UserError(f"{study.name}, {folder}: Slurm's scripts take no backslash or line break")
    for old in folder.glob("*.sh"):
        old.unlink()
    tasks = {}
    for stage in study.stages:
        runs = {str(i): run for i, run in enumerate(study.runs()) if run.stage == stage}
        if left := [number for number, run in runs.items() if not run.finished]:
            array = ",".join(left) + (f"%{jobs}" if jobs else "")
            tasks[stage] = ("%A_%a.txt", [f"--array={array}"], "--run $SLURM_ARRAY_TASK_ID")
    tasks["report"] = ("%j.txt", [], "--report-only")
    command = shlex.join([sys.executable, "-m", "rfa_mmdet", "ablate", *arguments])
    scripts: list[Path] = []
    for name, (log, own, what) in tasks.items():
        # Slurm replaces %j and the like in the name of an output.
        output = f"{folder}/{name}-".replace("%", "%%") + log
        all_options = [
            f"--partition={partition}",
            f"--job-name={study.name}-{name}",
            f"--output={output}",
            # A job whose node failed starts again, and its run continues.
            "--requeue",
            "--open-mode=append",
            *own,
            *options,
        ]
        lines = [
            "#!/usr/bin/env bash",
            *(f"#SBATCH {shlex.quote(option)}" for option in all_options),
            f"cd {shlex.quote(os.getcwd())} || exit",
            f"exec {command} {what}\n",
        ]
        scripts.append(folder / f"{len(scripts) + 1}_{name}.sh")
        with written_whole(scripts[-1]) as part:
            part.write_text("\n".join(lines), encoding="utf-8")
    numbers: list[str] = []
    for script in scripts if shutil.which("sbatch") else []:
        after = [f"--dependency=afterany:{number}" for number in numbers[-1:]]
        sbatch = ["sbatch", "--parsable", *after, str(script)]
        done = subprocess.run(sbatch, capture_output=True, text=True)
        if done.returncode:
            before = f"; submitted before: {', '.join(numbers)}" if numbers else ""
            said = done.stderr.strip() or done.returncode
            raise UserError(f"{shlex.join(sbatch)}: {said}{before}")
        numbers.append(done.stdout.strip().split(";")[0])
    return scripts, numbers
