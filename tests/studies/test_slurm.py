"""The scripts for Slurm, and what becomes of them where sbatch is missing or says no."""

import os
import subprocess
import sys

import pytest

from rfa_mmdet.errors import UserError
from rfa_mmdet.studies.slurm import submit
from rfa_mmdet.studies.study import load_study

SPEC = """
base = "base.py"
metric = "ap"
methods = dict(plain=dict(), ours=dict())
seeds = (0, 1)
stages = dict(first=dict(), next=dict(load_from="first"))
"""


@pytest.fixture
def study(tmp_path):
    """Two stages of two methods and two seeds; run 1 is finished."""
    (tmp_path / "base.py").write_text("model = dict(type='A')")
    (tmp_path / "spec.py").write_text(SPEC)
    found = load_study(tmp_path / "spec.py", tmp_path / "a work dir")
    found.runs()[1].update(train={}, test={})
    return found


def sbatch(folder, monkeypatch, text):
    """Put a stand-in for sbatch, and nothing else, onto the path."""
    file = folder / "bin" / "sbatch"
    file.parent.mkdir()
    file.write_text(f"#!{sys.executable}\n{text}")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(file.parent))


def test_scripts_without_sbatch(study, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    old = study.work_dir / "slurm" / "9_old.sh"
    old.parent.mkdir()
    old.touch()
    scripts, numbers = submit(study, ["a spec.py"], "gpus", jobs=2, options=["--gres=gpu:1"])
    assert numbers == []
    assert not old.exists()
    assert [script.name for script in scripts] == ["1_first.sh", "2_next.sh", "3_report.sh"]
    first, later, report = (script.read_text() for script in scripts)
    for line in ("--partition=gpus", "--array=0,2,3%2", "--gres=gpu:1", "--job-name=spec-first"):
        assert f"#SBATCH {line}\n" in first
    assert "#SBATCH --array=4,5,6,7%2\n" in later
    assert "--array" not in report
    assert f"#SBATCH --output={study.work_dir.resolve()}/slurm/report-%j.txt\n" in report


def test_scripts_call_ablate_from_here(study, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", f"{tmp_path}/fake python")
    fake = tmp_path / "fake python"
    fake.write_text('#!/bin/sh\npwd; printf "<%s>" "$@"; echo')
    fake.chmod(0o755)
    scripts, _ = submit(study, ["a spec.py", "--work-dir", "$x"], "gpus")
    said = [
        subprocess.run(
            ["bash", script],
            cwd=tmp_path,
            env={**os.environ, "SLURM_ARRAY_TASK_ID": "5"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for script in scripts
    ]
    call = f"{os.getcwd()}\n<-m><rfa_mmdet><ablate><a spec.py><--work-dir><$x>"
    assert said == [f"{call}<--run><5>\n", f"{call}<--run><5>\n", f"{call}<--report-only>\n"]


def test_each_job_waits_for_the_one_before(study, monkeypatch, tmp_path):
    log = tmp_path / "calls"
    text = f"import sys; print(sys.argv[1:-1], file=open({str(log)!r}, 'a')); print('7;cluster')"
    sbatch(tmp_path, monkeypatch, text)
    assert submit(study, ["spec.py"], "gpus")[1] == ["7", "7", "7"]
    waits = "['--parsable', '--dependency=afterany:7']"
    assert log.read_text().splitlines() == ["['--parsable']", waits, waits]


def test_sbatch_that_rejects_a_script(study, monkeypatch, tmp_path):
    sbatch(tmp_path, monkeypatch, "raise SystemExit('invalid partition specified: gpus')")
    with pytest.raises(UserError, match=r"1_first.sh.*: invalid partition specified: gpus"):
        submit(study, ["spec.py"], "gpus")
