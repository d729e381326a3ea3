"""Submit all runs as Slurm job arrays, one per stage, and a final job that writes the report."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole
from rfa_mmdet.studies.execute import run_config
from rfa_mmdet.studies.study import Study


def submit(
    study: Study,
    arguments: Sequence[str],
    partition: str,
    jobs: int | None = None,
    options: Sequence[str] = (),
) -> tuple[list[Path], list[str]]:
    """Write a script for each stage and one for the report, and submit them if sbatch is available.

    A stage starts when the previous one has ended, even if some of its runs failed: a run that
    depends on a failed one fails with a clear error.

    Args:
        study (Study): The study; its work dir must be visible on all nodes.
        arguments (Sequence[str]): Arguments of ``ablate`` for all jobs.
        partition (str): Slurm partition.
        jobs (int | None): Maximum number of parallel runs. Defaults to None: no limit.
        options (Sequence[str]): More options for sbatch, e.g. '--gres=gpu:1'. Defaults to none.

    Returns:
        tuple[list[Path], list[str]]: The scripts in order, and their job IDs; no IDs without
        sbatch.

    Raises:
        UserError: sbatch rejects a script, or a name is not possible in a script.
        ConfigError: A folder contains a run with another config; nothing has been submitted.
    """
    for run in study.runs():
        run_config(study, run)
    folder = (study.work_dir / "slurm").resolve()
    if set("\\\n") & set(f"{study.name}{folder}"):
        raise UserError(
            f"{study.name}, {folder}: backslashes and line breaks are not allowed in Slurm scripts"
        )
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
        # Slurm expands %j and the like in output names.
        output = f"{folder}/{name}-".replace("%", "%%") + log
        all_options = [
            f"--partition={partition}",
            f"--job-name={study.name}-{name}",
            f"--output={output}",
            # A job whose node failed is restarted, and its run resumes.
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
            before = f"; already submitted: {', '.join(numbers)}" if numbers else ""
            said = done.stderr.strip() or done.returncode
            raise UserError(f"{shlex.join(sbatch)}: {said}{before}")
        numbers.append(done.stdout.strip().split(";")[0])
    return scripts, numbers
