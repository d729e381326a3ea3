"""The folder of a run: its results and its lock."""

import json
import os
import threading

import pytest

from rfa_mmdet.errors import UserError
from rfa_mmdet.studies.run import Run


def test_locked_run_is_not_started(tmp_path, monkeypatch):
    monkeypatch.setattr("rfa_mmdet.studies.run.LOCK_TIMEOUT", 0.0)
    run = Run(tmp_path, "all", "a", 0)
    with run.locked():
        again = Run(tmp_path, "all", "a", 0).locked()
        with pytest.raises(UserError, match="another process is working on this run"):
            again.__enter__()
        with Run(tmp_path, "all", "a", 1).locked():
            pass
    with run.locked():
        pass


def test_lock_is_waited_for(tmp_path):
    # Like the lock of a killed training's workers, which outlive it by seconds.
    run = Run(tmp_path, "all", "a", 0)
    left = threading.Event()

    def leave(lock):
        left.set()
        lock.__exit__(None, None, None)

    lock = run.locked()
    lock.__enter__()
    timer = threading.Timer(0.5, leave, [lock])
    timer.start()
    with Run(tmp_path, "all", "a", 0).locked():
        assert left.is_set()
    timer.join()


def test_log_of_a_resumed_run_with_a_truncated_line(tmp_path):
    run = Run(tmp_path, "all", "a", 0)
    for name, text in (("1", '{"step": 1}\n{"st'), ("2", '{"step": 2}\n')):
        (run.folder / "train" / name / "vis_data").mkdir(parents=True)
        (run.folder / "train" / name / "vis_data" / "scalars.json").write_text(text)
    assert run.scalars() == [dict(step=1), dict(step=2)]


@pytest.mark.parametrize(
    ("validated", "kept", "expected"),
    [
        ([], [], None),
        ([], ["epoch_1"], "epoch_1"),  # killed in its validation, with nothing before it
        ([1], ["epoch_1"], "epoch_1"),
        ([1, 2], ["epoch_2", "epoch_3"], "epoch_2"),
        ([8, 9, 10], ["epoch_9", "epoch_10", "epoch_11"], "epoch_10"),
        ([100, 200], ["iter_100", "iter_200"], "iter_200"),
    ],
)
def test_a_run_resumes_after_a_validated_epoch(validated, kept, expected, tmp_path):
    run = Run(tmp_path, "all", "a", 0)
    train = run.folder / "train"
    (train / "1" / "vis_data").mkdir(parents=True)
    lines = [dict(step=9999, loss=1.0), *(dict(step=step, map=0.5) for step in validated)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (train / "1" / "vis_data" / "scalars.json").write_text(text)
    for name in kept:
        (train / f"{name}.pth").touch()
        (train / "last_checkpoint").write_text(f"/elsewhere/{name}.pth")
    found = run.resumable_checkpoint()
    assert (found and found.stem) == expected


def test_results_of_a_run(tmp_path):
    run = Run(tmp_path, "all", "a", 0)
    assert run.record == {}
    run.update(train=dict(memory_mb=1), error="some")
    assert not run.finished
    run.update(test={}, error=None)
    assert run.finished
    assert run.record == dict(train=dict(memory_mb=1), test={}, error=None)
    assert Run(tmp_path, "all", "a", 1).record == {}
    (run.folder / "record.json").write_text('{"train": ')
    assert run.record == {}


def test_last_and_best_checkpoint(tmp_path):
    run = Run(tmp_path, "all", "a", 0)
    assert run.checkpoint("last") is None
    assert run.checkpoint("best") is None
    train = run.folder / "train"
    train.mkdir(parents=True)
    # As written by MMEngine: relative to the folder where the training was started.
    (train / "last_checkpoint").write_text("elsewhere/train/epoch_2.pth\n")
    assert run.checkpoint("last") is None
    (train / "epoch_2.pth").touch()
    assert run.checkpoint("last") == train / "epoch_2.pth"
    for age, name in enumerate(("best_ap_epoch_9.pth", "best_ap_epoch_10.pth")):
        (train / name).touch()
        os.utime(train / name, (1000 - age, 1000 - age))
    assert run.checkpoint("best") == train / "best_ap_epoch_9.pth"


def test_best_checkpoint_of_the_metric(tmp_path):
    run = Run(tmp_path, "all", "a", 0)
    train = run.folder / "train"
    train.mkdir(parents=True)
    names = (
        "best_coco_map_epoch_3.pth",
        "best_coco_map_50_epoch_4.pth",
        "best_coco_map_s_iter_5.pth",
    )
    for age, name in enumerate(reversed(names)):
        (train / name).touch()
        os.utime(train / name, (1000 - age, 1000 - age))
    for metric, name in zip(("coco/map", "coco/map_50", "coco/map_s"), names, strict=True):
        assert run.checkpoint("best", metric) == train / name
    assert run.checkpoint("best", "another") == train / names[-1]
