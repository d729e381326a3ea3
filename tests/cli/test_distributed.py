"""Two ranks on a CPU: the same results as one rank, no hang if one dies, and resuming."""

import json
import os
import pickle
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import torch

from tests.helpers.paths import ROOT
from tests.helpers.ports import free_port
from tests.helpers.processes import PATIENCE, wait_until

# Ends the second rank in the middle of the second epoch, in the given way.
DIES = """
import os
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class DyingHook(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if (runner.rank, runner.epoch, batch_idx) == (1, 1, 1):
            if os.environ["DIES"] == "raises":
                raise OSError("the disk of rank 1 is gone")
            os.kill(os.getpid(), 9)
"""


def metrics(work_dir):
    """Return the logged metrics of a test, without times."""
    found = json.loads(next(work_dir.glob("*/*.json")).read_text())
    return {k: v for k, v in found.items() if k not in ("time", "data_time")}


def predictions(path):
    """Return detections by image."""
    return {one["img_id"]: one["pred_instances"] for one in pickle.loads(path.read_bytes())}


def processes_with(text):
    """Return processes with ``text`` in their command line."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(text in part for part in process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_evaluation_with_two_ranks_equals_one_rank(
    run_tool, tiny_config, checkpoint, shapes, tmp_path
):
    # Five images: two ranks get three each, and the repeated one must not count twice.
    root = tmp_path / "shapes"
    root.mkdir()
    for name in ("JPEGImages", "Annotations", "ImageSets"):
        (root / name).symlink_to(shapes / name)
    (root / "annotations").mkdir()
    train = json.loads((shapes / "annotations" / "train.json").read_text())
    images = train["images"][:5]
    kept = {image["id"] for image in images}
    found = [a for a in train["annotations"] if a["image_id"] in kept]
    (root / "annotations" / "val.json").write_text(
        json.dumps(dict(train, images=images, annotations=found))
    )
    (root / "annotations" / "train.json").symlink_to(shapes / "annotations" / "train.json")
    one = run_tool(
        *("bash", "-c", '"$PYTHON" "$@"', "-", "tools/test.py", tiny_config, checkpoint),
        *("--work-dir", tmp_path / "1", "--out", tmp_path / "1.pkl"),
        DATA_ROOT=str(root),
    )
    assert one.returncode == 0, one.stdout
    two = run_tool(
        *("bash", "tools/dist_test.sh", tiny_config, checkpoint, 2),
        *("--work-dir", tmp_path / "2", "--out", tmp_path / "2.pkl"),
        PORT=free_port(),
        DATA_ROOT=str(root),
    )
    assert two.returncode == 0, two.stdout
    assert "[3/3]" in two.stdout
    assert metrics(tmp_path / "1") == metrics(tmp_path / "2")
    ours, theirs = predictions(tmp_path / "2.pkl"), predictions(tmp_path / "1.pkl")
    assert ours.keys() == theirs.keys() == kept
    for image, instances in theirs.items():
        assert len(instances["scores"]) > 5
        for name, value in instances.items():
            assert torch.equal(ours[image][name], value)


@pytest.fixture(scope="module")
def train_until_death(run_tool, tmp_path_factory, tiny_config):
    """Return a function that trains with two ranks until the second one dies."""
    folder = tmp_path_factory.mktemp("dying")
    (folder / "dying_hook.py").write_text(DIES)
    config = folder / "dying.py"
    config.write_text(
        f'_base_ = "{tiny_config}"\n'
        'custom_imports = dict(imports=["rfa_mmdet", "dying_hook"])\n'
        'custom_hooks = [*_base_.custom_hooks, dict(type="DyingHook")]\n'
        "train_cfg = dict(max_epochs=2)\n"
    )

    def run(work_dir, way, message):
        done = run_tool(
            *("bash", "tools/dist_train.sh", config, 2, "--work-dir", work_dir),
            PYTHONPATH=str(folder),
            DIES=way,
            PORT=free_port(),
        )
        assert done.returncode != 0
        assert message in done.stdout
        assert "rank      : 1 (local_rank: 1)" in done.stdout
        # It did not wait for gloo's timeout of half an hour, which is longer than run_tool's. And
        # no process is left: neither the other rank nor a dataloader worker.
        wait_until(lambda: not processes_with(str(work_dir)))
        assert (work_dir / "epoch_1.pth").is_file()
        assert not (work_dir / "epoch_2.pth").exists()

    return run


@pytest.mark.slow
def test_killed_rank_ends_the_job(train_until_death, tmp_path):
    train_until_death(tmp_path, "is killed", "Signal 9 (SIGKILL)")


@pytest.mark.slow
def test_failing_rank_ends_the_job_and_training_resumes_from_the_last_checkpoint(
    run_tool, train_until_death, tiny_config, tmp_path
):
    (tmp_path / "whole.py").write_text(
        f'_base_ = "{tiny_config}"\ntrain_cfg = dict(max_epochs=2)\n'
    )
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    train = ("bash", "tools/dist_train.sh")
    train_until_death(broken, "raises", "OSError: the disk of rank 1 is gone")
    config = tmp_path / "whole.py"
    again = run_tool(*train, config, 2, "--work-dir", broken, "--resume", PORT=free_port())
    assert again.returncode == 0, again.stdout
    assert "resumed epoch: 1" in again.stdout
    assert "Epoch(train) [1]" not in again.stdout
    once = run_tool(*train, config, 2, "--work-dir", whole, PORT=free_port())
    assert once.returncode == 0, once.stdout
    ours, theirs = (
        torch.load(folder / "epoch_2.pth", weights_only=False)["state_dict"]
        for folder in (broken, whole)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_two_nodes_find_each_other(environment, tiny_config, tmp_path):
    variables = dict(NNODES="2", MASTER_ADDR="127.0.0.1", PORT=free_port())
    nodes = [
        subprocess.Popen(
            [
                *("bash", "tools/dist_train.sh", str(tiny_config), "1"),
                *("--work-dir", str(tmp_path / "work")),
                *("--cfg-options", "train_cfg.max_epochs=1"),
            ],
            cwd=ROOT,
            env={**environment, **variables, "NODE_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for rank in (0, 1)
    ]
    try:
        printed = [node.communicate(timeout=PATIENCE)[0] for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
    assert [node.returncode for node in nodes] == [0, 0], printed
    # 12 images, batches of 4, two processes.
    assert "[1][2/2]" in printed[0]
    assert Path(tmp_path / "work" / "epoch_1.pth").is_file()
