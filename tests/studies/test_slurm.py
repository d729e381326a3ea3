"""The Slurm scripts, run by real Slurm, without Slurm, and rejected by Slurm."""

import csv
import json
import sys

import pytest

from rfa_mmdet.errors import ConfigError, UserError
from rfa_mmdet.studies.slurm import submit
from rfa_mmdet.studies.study import load_study
from tests.helpers.processes import wait_until

SPEC = """
base = "base.py"
metric = "ap"
methods = dict(plain=dict(), ours=dict())
seeds = (0, 1)
stages = dict(first=dict(), next=dict(load_from="first"))
"""
# Writes a line for each batch, and waits in the second epoch to be killed.
HOLD = """
import time
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class HoldHook(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        path = runner.work_dir + "/batches.txt"
        with open(path, "a") as file:
            print(runner.epoch, batch_idx, file=file)
        # Wait to be killed. After resuming, the line is there twice.
        while (runner.epoch, batch_idx) == (1, 0) and open(path).read().count("1 0\\n") == 1:
            time.sleep(0.1)
"""
TRAININGS = """
base = {base!r}
metric = "coco/bbox_mAP_50"
methods = dict(
    plain={{"model.backbone.rfa": None, "model.backbone.stage_with_rfa": None}},
    rfaconv={{}},
)
seeds = (0,)
samples = 0
options = {{
    "train_cfg.max_epochs": 2,
    "custom_imports": dict(imports=["rfa_mmdet", "hold_hook"]),
    "custom_hooks": [dict(type="HoldHook")],
}}
"""


@pytest.fixture
def study(tmp_path):
    """Return two stages of two methods and two seeds; run 1 is finished."""
    (tmp_path / "base.py").write_text("model = dict(type='A')")
    (tmp_path / "spec.py").write_text(SPEC)
    found = load_study(tmp_path / "spec.py", tmp_path / "work")
    found.runs()[1].update(train={}, test={})
    return found


@pytest.mark.slow
def test_killed_or_requeued_jobs_resume(cluster, run_tool, tiny_config, tmp_path):
    # Possible file names that must have no special meaning for Slurm or a shell.
    folder = tmp_path / '100%j of "a" $x\'s #1'
    folder.mkdir()
    (folder / "hold_hook.py").write_text(HOLD)
    spec, work_dir = folder / "my $spec.py", folder / "work"
    spec.write_text(TRAININGS.format(base=str(tiny_config)))

    def ablate():
        done = run_tool(
            *(sys.executable, "tools/ablate.py", spec, "--work-dir", work_dir),
            *("--slurm", "part", "--slurm-args", "cpus-per-task=1", "comment=two words"),
            **{**cluster.environment, "PYTHONPATH": str(folder)},
        )
        assert done.returncode == 0, done.stdout
        return done.stdout.split("submitted jobs ")[1].split(";")[0].split(", ")

    def run_folder(method):
        return work_dir / "runs" / "all" / method / "seed0"

    def seen(method):
        path = run_folder(method) / "train" / "batches.txt"
        return path.read_text().splitlines() if path.exists() else []

    def states():
        found = json.loads((work_dir / "results.json").read_text())["runs"]
        return [run["state"] for run in found]

    array, report = ablate()
    wait_until(lambda: all("1 0" in seen(m) for m in ("plain", "rfaconv")), printed=cluster.jobs)
    cluster.run("scontrol", "requeue", f"{array}_0")
    cluster.run("scancel", f"{array}_1")
    cluster.wait()
    # Slurm ends a job's processes one by one: the training, or the process that waits for it.
    assert states() in (["finished", "started"], ["finished", "failed"])
    assert "report.html" in (work_dir / "slurm" / f"report-{report}.txt").read_text()
    finished = (run_folder("plain") / "record.json").stat()
    ablate()
    cluster.wait()
    assert "#SBATCH --array=1\n" in (work_dir / "slurm" / "1_all.sh").read_text()
    assert states() == ["finished", "finished"]
    assert (run_folder("plain") / "record.json").stat() == finished
    for method in ("plain", "rfaconv"):
        # Three batches per epoch; killed after one of the second epoch, which is then repeated.
        assert seen(method) == ["0 0", "0 1", "0 2", "1 0", "1 0", "1 1", "1 2"]
        assert "--resume " in (run_folder(method) / "log.txt").read_text()
    rows = list(csv.DictReader((work_dir / "table.csv").open()))
    assert [(row["method"], row["verdict"]) for row in rows] == [
        ("plain", ""),
        ("rfaconv", "cannot be tested"),
    ]


@pytest.mark.slow
def test_slurm_rejects_a_script(cluster, study, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    with pytest.raises(UserError, match=r"1_first.sh: .*invalid partition specified: gpus"):
        submit(study, ["spec.py"], "gpus")
    assert not cluster.jobs()


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


def test_runs_with_another_config_are_not_submitted(study, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    run = study.runs()[1]
    cfg = study.config(run)
    cfg.model.type = "B"
    cfg.dump(run.config)
    with pytest.raises(ConfigError, match=r"another config \(different: model\)"):
        submit(study, ["spec.py"], "gpus")
    assert not (study.work_dir / "slurm").exists()


def test_later_script_is_rejected_by_a_federation(study, monkeypatch, tmp_path):
    """Federated clusters append their name to job IDs; users may have a job limit."""
    calls = tmp_path / "calls"
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        f"#!{sys.executable}\nimport sys\nfile = open({str(calls)!r}, 'a+')\n"
        "print(sys.argv[1:-1], file=file)\nfile.seek(0)\n"
        "sys.exit('job limit' if len(list(file)) > 2 else print('7;cluster'))"
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(sbatch.parent))
    with pytest.raises(UserError, match=r"3_report.sh.*: job limit; already submitted: 7, 7"):
        submit(study, ["spec.py"], "gpus")
    waits = "['--parsable', '--dependency=afterany:7']"
    assert calls.read_text().splitlines() == ["['--parsable']", waits, waits]


@pytest.mark.parametrize("name", ["back\\slash", "two\nlines"])
def test_names_not_possible_in_a_script(study, tmp_path, name):
    moved = load_study(tmp_path / "spec.py", tmp_path / name)
    with pytest.raises(UserError, match="backslashes and line breaks are not allowed"):
        submit(moved, ["spec.py"], "gpus")
    assert not (tmp_path / name).exists()
