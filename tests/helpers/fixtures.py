"""A drawn dataset and a detector that trains in seconds, for real runs of the tools."""

import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from rfa_mmdet.data.shapes import make_shapes
from tests.helpers.paths import ROOT
from tests.helpers.processes import PATIENCE
from tests.helpers.random_checkpoint import save_random_checkpoint

TINY = f"""
_base_ = [
    "{ROOT}/configs/_base_/models/retinanet_r18-rfaconv_fpn.py",
    "{ROOT}/configs/_base_/datasets/shapes.py",
    "{ROOT}/configs/_base_/schedules/adamw_50e.py",
]
model = dict(
    backbone=dict(base_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    bbox_head=dict(
        num_classes=4,
        in_channels=16,
        feat_channels=16,
        stacked_convs=1,
        anchor_generator=dict(octave_base_scale=2),
    ),
    # After nine iterations no score is high, and without detections there are no metrics. Drawing
    # a hundred of them takes longer than finding them.
    test_cfg=dict(score_thr=0.0, max_per_img=20),
)
train_dataloader = dict(batch_size=4)
val_dataloader = test_dataloader = dict(batch_size=1)
train_cfg = dict(max_epochs=3)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=-1), logger=dict(interval=1))
randomness = dict(seed=0, deterministic=True)
"""


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """Return 12 training and 4 validation images of 64 x 64."""
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, num_train=12, num_val=4, image_size=(64, 64), seed=0, max_objects=3)
    return root


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory) -> Path:
    """Return the config of a thin RetinaNet on the shapes."""
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def environment(shapes) -> dict[str, str]:
    """Return the environment of the tools' processes: the dataset, and one thread each."""
    return {
        **os.environ,
        "DATA_ROOT": str(shapes),
        "OMP_NUM_THREADS": "1",
        "PYTHON": sys.executable,
        # Not another checkout that may be installed.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }


@pytest.fixture(scope="session")
def run_tool(environment):
    """Run a command as a process in the checkout; the result has its output.

    Keyword arguments are environment variables; folders on PYTHONPATH precede the checkout.
    """

    def run(*command, **variables) -> subprocess.CompletedProcess:
        variables = {**environment, **variables}
        if variables["PYTHONPATH"] != environment["PYTHONPATH"]:
            variables["PYTHONPATH"] += os.pathsep + environment["PYTHONPATH"]
        done = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE,
        )
        print(done.stdout)  # shown if a test fails
        assert "pkg_resources is deprecated" not in done.stdout  # the user cannot fix it
        return done

    return run


@pytest.fixture(scope="session")
def checkpoint(tiny_config, shapes, tmp_path_factory) -> Path:
    """Return a checkpoint of the untrained thin detector with scores from about 0 to 1."""
    return save_random_checkpoint(tiny_config, tmp_path_factory.mktemp("weights") / "random.pth")


@pytest.fixture
def fails(capsys, monkeypatch, shapes):
    """Run a tool in this process; return the one error that it ends with."""

    def run(tool, *arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("DATA_ROOT", str(shapes))
        # MMEngine's logger may have kept the stream of an earlier test, which is closed.
        monkeypatch.setattr(logging, "raiseExceptions", False)
        monkeypatch.setattr(sys, "argv", [f"tools/{tool}.py", *map(str, arguments)])
        capsys.readouterr()  # discard what the test itself printed
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(f"tools/{tool}.py", run_name="__main__")
        assert stop.value.code == 1
        errors = capsys.readouterr().err
        assert errors.count("error: ") == 1
        assert "Traceback" not in errors
        return errors[errors.index("error: ") :]

    return run


@pytest.fixture(scope="session")
def trained(run_tool, tiny_config, tmp_path_factory) -> Path:
    """Return the work dir of an uninterrupted training of three epochs."""
    work_dir = tmp_path_factory.mktemp("trained")
    done = run_tool(sys.executable, "tools/train.py", tiny_config, "--work-dir", work_dir)
    assert done.returncode == 0, done.stdout
    return work_dir
