"""A Runner only takes what it needs from a checkpoint, unlike plain MMEngine."""

import os
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import _load_checkpoint

from rfa_mmdet.checkpoints.safe_loading import BrokenCheckpointError
from tests.helpers.toy_checkpoints import ToyModel, make_runner


def resume(path, work_dir, epochs=2, **kwargs):
    """Resume from a file until the end of the run, which saves its own checkpoints."""
    runner = make_runner(work_dir, epochs, resume=True, load_from=str(path), **kwargs)
    runner.train()
    return runner


@pytest.fixture
def edited(trained, tmp_path):
    """Return a function that saves a modified checkpoint of the first epoch."""

    def edit(change, name="epoch_1.pth"):
        content = _load_checkpoint(str(trained / name))
        content = change(content) or content
        torch.save(content, tmp_path / "edited.pth")
        return tmp_path / "edited.pth"

    return edit


def put(*keys, value):
    """Return a change of one value; ``None`` as the last key means the first of a list."""

    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


def drop(*keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


# ------------------------------------------------------------------ nothing is executed or removed


@pytest.mark.parametrize(
    "where",
    [
        ("meta", "config"),
        ("meta", "cfg"),
        ("message_hub", "runtime_info", "cfg"),
        ("message_hub", "runtime_info", "config"),
    ],
)
def test_config_text_of_a_checkpoint_is_not_executed(edited, tmp_path, where):
    code = f"open({str(tmp_path / 'marker')!r}, 'w')"
    path = edited(put(*where, value=code))
    resume(path, tmp_path / "run")
    assert not (tmp_path / "marker").exists()
    own = _load_checkpoint(str(tmp_path / "run/epoch_2.pth"))
    assert code not in (own["meta"]["cfg"], own["message_hub"]["runtime_info"]["cfg"])


@pytest.mark.parametrize("kept", [["../../other/{}"], ["1/../../../mine"], "123", 3, [-1], [1.5]])
def test_ids_of_old_checkpoints_must_be_integers(edited, tmp_path, kept):
    (tmp_path / "mine.pth").touch()
    (tmp_path / "run/epoch_1").mkdir(parents=True)
    path = edited(put("message_hub", "runtime_info", "keep_ckpt_ids", value=kept))
    resume(path, tmp_path / "run", checkpoint=dict(max_keep_ckpts=1))
    assert (tmp_path / "mine.pth").exists()
    assert (tmp_path / "run/epoch_2.pth").exists()


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        *("{other}/mine.pth", "{other}", "{other}/best_a.pth", "../other/best_a.pth"),
        *("best_/../../other/mine.pth", "{run}/keep.pth", "{run}/../other", "", "best_", None, 3),
        *("best_../../other/mine.pth", "{run}", ["{other}"], "s3://bucket/best_a.pth"),
    ],
)
def test_best_checkpoint_must_belong_to_this_run(edited, tmp_path, name, several):
    other, run = tmp_path / "other", tmp_path / "run"
    for folder in (other, run):
        folder.mkdir()
        for file in ("mine.pth", "keep.pth"):
            (folder / file).touch()
    (other / "best_a.pth").touch()
    name = name.format(other=other, run=run) if isinstance(name, str) else name
    info = {"best_ckpt": name, "best_ckpt_toy/acc": name, "best_score_toy/acc": 0.1}

    def change(content):
        content["message_hub"]["runtime_info"].update(info, best_score=0.1)

    checkpoint = dict(save_best=["toy/acc", "toy/loss"], rule="greater") if several else {}
    resume(edited(change), run, accuracy=0.9, checkpoint=checkpoint)
    assert sorted(os.listdir(other)) == ["best_a.pth", "keep.pth", "mine.pth"]
    assert {"mine.pth", "keep.pth", "best_toy_acc_epoch_2.pth"} <= set(os.listdir(run))


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_previous_best_checkpoint_is_removed(tmp_path, moved, several):
    run = tmp_path / "run"
    checkpoint = dict(save_best=["toy/acc", "toy/loss"], rule="greater") if several else {}
    checkpoint["max_keep_ckpts"] = 1
    make_runner(run, 1, checkpoint=checkpoint).train()
    names = {"best_toy_acc_epoch_1.pth", *["best_toy_loss_epoch_1.pth"] * several}
    assert {p.name for p in run.glob("best_*")} == names
    if moved:
        run = Path(shutil.move(run, tmp_path / "elsewhere"))
    resume(run / "epoch_1.pth", run, accuracy=0.9, checkpoint=checkpoint)
    names = {"best_toy_acc_epoch_2.pth", *["best_toy_loss_epoch_1.pth"] * several}
    assert {p.name for p in run.glob("best_*")} == names
    assert {p.name for p in run.glob("epoch_*")} == {"epoch_2.pth"}


def test_best_checkpoint_is_kept_if_the_new_one_is_worse(trained, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    resume(run / "epoch_1.pth", run, accuracy=0.1)
    assert [p.name for p in run.glob("best_*")] == ["best_toy_acc_epoch_1.pth"]
    info = _load_checkpoint(str(run / "epoch_2.pth"))["message_hub"]["runtime_info"]
    assert info["best_ckpt"] == str(run / "best_toy_acc_epoch_1.pth")


def test_invalid_scores_are_ignored(edited, tmp_path):
    path = edited(put("message_hub", "runtime_info", "best_score", value="high"))
    resume(path, tmp_path / "run")
    assert (tmp_path / "run/best_toy_acc_epoch_2.pth").exists()


@pytest.mark.parametrize("odd", [HistoryBuffer(), "text", None, torch.ones(2)])
def test_invalid_log_histories_are_ignored(edited, tmp_path, odd):
    def change(content):
        scalars = content["message_hub"]["log_scalars"]
        scalars.update(dict.fromkeys(scalars, odd))

    resume(edited(change), tmp_path / "run")
    assert (tmp_path / "run/epoch_2.pth").exists()


# ------------------------------------------------------------------ valid checkpoints resume


METAINFO = [
    dict(classes=("a", "b"), palette=[(1, 2, 3)]),
    dict(pose=ConfigDict(joints=ConfigDict(left=1), names=["a"])),
    dict(sizes=np.arange(3), names=np.array(["a", "bc"]), score=np.float32(0.5), path=Path("a")),
    dict(lists=[[1, (2, {3})]], ordered=OrderedDict(a=1), kind=torch.float16, cut=slice(1, 2)),
]


@pytest.mark.parametrize("metainfo", METAINFO)
def test_plain_metainfo_of_any_type(tmp_path, metainfo, caplog):
    make_runner(tmp_path, 1, metainfo=metainfo).train()
    runner = resume(tmp_path / "epoch_1.pth", tmp_path, metainfo=metainfo)
    assert runner.iter == 4
    assert "dataset metainfo" not in caplog.text


OPTIMIZERS = [
    dict(type="SGD", lr=0.01),
    dict(type="SGD", lr=0.01, momentum=0.9, nesterov=True),
    dict(type="Adam", lr=0.01, amsgrad=True),
    *(dict(type=name, lr=0.01) for name in ("NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta")),
    *(dict(type=name, lr=0.01) for name in ("Adamax", "ASGD", "Rprop")),
]
SCHEDULES = [
    [dict(type="MultiStepLR", milestones=[1, 2]), dict(type="LinearMomentum", end=2)],
    [dict(type="OneCycleLR", eta_max=0.1, total_steps=8, by_epoch=False)],
    [dict(type="ReduceOnPlateauLR", monitor="toy/acc", rule="greater")],
    [dict(type="CosineRestartLR", periods=[1, 3], restart_weights=[1, 0.5], eta_min=0)],
    [dict(type="PolyLR"), dict(type="ExponentialLR", gamma=0.9), dict(type="StepLR", step_size=1)],
    None,
]
CASES = [
    *(dict(optim_wrapper=dict(optimizer=optimizer)) for optimizer in OPTIMIZERS),
    *(
        dict(
            param_scheduler=schedule,
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01, momentum=0.9)),
        )
        for schedule in SCHEDULES
    ),
    dict(optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01), accumulative_counts=2)),
    dict(
        optim_wrapper=dict(
            optimizer=dict(type="AdamW", lr=0.01, weight_decay=0.1),
            paramwise_cfg=dict(bias_lr_mult=2.0, norm_decay_mult=0.0),
            clip_grad=dict(max_norm=1),
        )
    ),
    dict(train_cfg=dict(by_epoch=False, max_iters=4, val_interval=2)),
    *(
        dict(custom_hooks=[dict(type="EMAHook", ema_type=name, **more)])
        for name, more in (
            ("StochasticWeightAverage", {}),
            ("MomentumAnnealingEMA", dict(update_buffers=True)),
        )
    ),
]


@pytest.mark.parametrize("kwargs", CASES, ids=str)
def test_optimizers_schedules_and_averages_resume(tmp_path, kwargs):
    by_epoch = "train_cfg" not in kwargs
    checkpoint = dict(by_epoch=by_epoch, interval=1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    runs = [make_runner(whole, 2, checkpoint=checkpoint, **kwargs)]
    runs[0].train()
    first = whole / ("epoch_1.pth" if by_epoch else "iter_2.pth")
    runs.append(resume(first, broken, checkpoint=checkpoint, **kwargs))
    assert runs[0].iter == runs[1].iter == 4
    last = "epoch_2.pth" if by_epoch else "iter_4.pth"
    weights = [_load_checkpoint(str(folder / last))["state_dict"] for folder in (whole, broken)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


# ------------------------------------------------------------------ others raise in one sentence


def another_state(**optimizer):
    def change(content):
        model = ToyModel()
        other = getattr(torch.optim, optimizer.pop("type"))(model.parameters(), lr=0.1, **optimizer)
        model([torch.ones(2)], "loss")["loss"].backward()
        other.step()
        content["optimizer"] = other.state_dict()

    return change


GROUP = ("optimizer", "param_groups", 0)
INFO, HUB = ("message_hub", "runtime_info"), "message_hub"
WRONG = {
    "list": (lambda c: [c], "pth: contains a list, not a dict"),
    "int keys": (lambda c: {0: c}, "its state dict has the key 0; keys must be short printable"),
    "int weights": (put("state_dict", 0, value=torch.ones(1)), "state dict has the key 0"),
    "no weights": (put("state_dict", value=[1]), "its state_dict is a list, not a dict"),
    "tensor": (put("state_dict", value=torch.ones(2)), "its state_dict is a Tensor, not a dict"),
    "long name": (put("state_dict", 8000 * "a", value=torch.ones(1)), r"the key 'aaa.{,90}\.\.\."),
    "escapes": (put("state_dict", "\x1b[31m", value=torch.ones(1)), r"the key '\\x1b\[31m'"),
    "meta": (put("meta", value=[]), "its meta is a list, not a dict"),
    "meta None": (put("meta", value=None), "has no meta, so it cannot be resumed from"),
    "no meta": (drop("meta"), "has no meta, so it cannot be resumed from"),
    "no hub": (drop("message_hub"), "has no message_hub, so it cannot"),
    "hub": (put("message_hub", value=3), "its message_hub is a int, not a dict"),
    "half a hub": (drop(HUB, "log_scalars"), r"message_hub\['log_scalars'\] is a NoneType, not"),
    "no info": (put(*INFO, value=[]), r"message_hub\['runtime_info'\] is a list, not"),
    "log name": (
        put(HUB, "log_scalars", "train/\x1b[2J", value=HistoryBuffer()),
        r"log_scalars'\] has the key 'train/\\x1b\[2J'",
    ),
    "no optimizer": (drop("optimizer"), "has no optimizer, so it cannot be resumed.*load_from"),
    "no schedules": (drop("param_schedulers"), "has no param_schedulers, so it cannot"),
    "optimizer": (put("optimizer", value=[]), "its optimizer is a list, not a dict"),
    "groups": (put("optimizer", "param_groups", value={}), "has no list of param_groups"),
    "more groups": (
        lambda c: c["optimizer"]["param_groups"].append(dict(params=[])),
        "has 2 parameters in 2 groups, which does not match the 2 parameters in 1 groups of",
    ),
    "fewer parameters": (put(*GROUP, "params", value=[0]), "1 parameters in 1 groups, which"),
    "SGD": (another_state(type="SGD", momentum=0.9), "does not fit the config's AdamW: KeyErr"),
    "Adamax": (another_state(type="Adamax"), "does not fit the config's AdamW: "),
    "Adagrad": (another_state(type="Adagrad"), "does not fit the config's AdamW: KeyError"),
    "rate": (put(*GROUP, "lr", value="fast"), "fit the config's AdamW: 'lr' is 'fast'"),
    "betas": (put(*GROUP, "betas", value=0.9), "fit the config's AdamW: 'betas' is 0.9"),
    "state": (put("optimizer", "state", value=[]), r"optimizer\.state is a list, not a dict"),
    "entry": (put("optimizer", "state", 0, value=[]), r"state\[0\] is a list, not a dict"),
    "keys": (
        lambda c: c["optimizer"].update(state={"0": c["optimizer"]["state"][0]}),
        "optimizer.state has the key '0', which is not in its",
    ),
    "empty": (put("optimizer", "state", value={}), "state is empty, but the config's AdamW needs"),
    "ids": (put(*GROUP, "params", value=[[], 1]), r"params=\[\[\], 1\], not a list of integers"),
    "no moment": (put("optimizer", "state", 0, "exp_avg", value=1.0), "is a float, not a tensor"),
    "no count": (
        put("optimizer", "state", 0, "step", value=None),
        r"\['step'\] is a NoneType, not",
    ),
    "moment": (drop("optimizer", "state", 0, "exp_avg"), "it has no exp_avg"),
    "shape": (
        put("optimizer", "state", 0, "exp_avg", value=torch.ones(7)),
        r"state\[0\]\['exp_avg'\] is \(7,\), but its parameter is \(1, 2\)",
    ),
    "schedules": (put("param_schedulers", value={}), "its param_schedulers is a NoneType, not"),
    "no schedule": (put("param_schedulers", value=torch.ones(0)), "schedulers is a Tensor, not a"),
    "method": (
        put("param_schedulers", 0, "_get_value", value=3),
        "does not fit the config's LinearLR: '_get_value' is 3",
    ),
    "owner": (put("param_schedulers", 0, "optimizer", value=3), "LinearLR: 'optimizer' is 3"),
    "step": (put("param_schedulers", 0, "last_step", value="x"), "LinearLR: 'last_step' is 'x'"),
    "name": (put("param_schedulers", 0, "param_name", value="params"), "'param_name' is 'params'"),
    "end": (put("param_schedulers", 0, "end", value=None), "LinearLR: 'end' is None"),
    "bases": (put("param_schedulers", 0, "base_values", value=["x"]), "LinearLR: 'base_values'"),
    "another": (lambda c: c["param_schedulers"].reverse(), "does not fit the config's LinearLR"),
    "weights": (
        put("state_dict", "fc.weight", value=torch.ones(5, 2)),
        r"does not fit the config's model: .*fc.weight \(\(5, 2\), model: \(1, 2\)\)",
    ),
    "no tensor": (put("state_dict", "fc.weight", value=3), r"fc.weight \(a int, not a tensor"),
    "other names": (drop("state_dict", "fc.weight"), "does not fit .*: missing fc.weight"),
    "average": (
        put("ema_state_dict", "module.x", value=torch.ones(1)),
        "ema_state_dict has keys without weights: module.x",
    ),
    "averaged shape": (
        put("ema_state_dict", "steps", value=torch.ones(3)),
        "its ema_state_dict differs in shape from its weights: steps",
    ),
    "averages": (put("ema_state_dict", value=[1]), "its ema_state_dict is a list, not a dict"),
    "epoch": (put("meta", "epoch", value="1"), "its meta has epoch='1'"),
    "below zero": (put("meta", "iter", value=-1), "its meta has iter=-1"),
    "huge": (put("meta", "iter", value=10**400), "its meta has iter=1000"),
    "no epoch": (drop("meta", "epoch"), "its meta has epoch=None"),
    "later": (put("meta", "epoch", value=9), "at epoch 9, beyond the config's train_cfg.max_ep"),
    "seed": (put("meta", "seed", value="x"), "its meta has seed='x'; must be from 0 to"),
    "names": (put("meta", "dataset_meta", value=[1]), r"meta\['dataset_meta'\] is a list"),
    "versions": (
        lambda c: setattr(c["state_dict"], "_metadata", {"": dict(version="x")}),
        r"_metadata\[''\] has the version 'x'",
    ),
    "modules": (
        lambda c: setattr(c["state_dict"], "_metadata", {3: dict(version=1)}),
        "_metadata has the key 3",
    ),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_invalid_states_give_one_clear_error(edited, tmp_path, name):
    change, message = WRONG[name]
    path = edited(change)
    with pytest.raises(BrokenCheckpointError, match=message) as info:
        resume(path, tmp_path / "run")
    message = str(info.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert len(message) < 600
    assert not list(tmp_path.glob("run/*.pth"))


@pytest.mark.parametrize("name", ["list", "int keys", "tensor", "escapes", "names", "versions"])
def test_load_from_gives_the_same_errors(edited, tmp_path, name):
    change, message = WRONG[name]
    runner = make_runner(tmp_path / "run", 1, load_from=str(edited(change)))
    with pytest.raises(BrokenCheckpointError, match=message):
        runner.train()


def test_best_checkpoint_cannot_be_resumed(trained, tmp_path):
    with pytest.raises(
        BrokenCheckpointError, match=r"has no optimizer and no param_schedulers, so"
    ):
        resume(trained / "best_toy_acc_epoch_1.pth", tmp_path / "run")
    runner = make_runner(tmp_path / "run", 2, custom_hooks=[])
    runner.resume(
        str(trained / "best_toy_acc_epoch_1.pth"),
        resume_optimizer=False,
        resume_param_scheduler=False,
    )
    assert runner.epoch == 1


def test_iterations_beyond_the_end_raise(edited, tmp_path):
    """MMEngine would skip them one by one."""
    path = edited(put("meta", "iter", value=2**40))
    with pytest.raises(BrokenCheckpointError, match=r"beyond the config's train_cfg\.max_iters=4"):
        resume(path, tmp_path / "run", train_cfg=dict(by_epoch=False, max_iters=4))
