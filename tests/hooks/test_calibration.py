"""What the first batches do to warm-started norms that will use batch statistics."""

import copy
import os
import re

import pytest
import torch
from mmengine.registry import HOOKS
from torch import multiprocessing as mp
from torch import nn

from rfa_mmdet.errors import ConfigError
from rfa_mmdet.hooks import calibration as calibration_hook
from rfa_mmdet.hooks.calibration import CalibrationHook, calibrate, uncalibrated
from rfa_mmdet.layers import RFAConv, RFCAConv, RFCBAMConv
from tests.helpers.ports import free_port
from tests.helpers.retrofitted import save_plain_detector
from tests.helpers.toy import Recorder, Toy, make_runner, pictures, plain_backbone, plain_file

HOOKS_OF_A_RUN = (dict(type="NewLayersHook"), dict(type="CalibrationHook", batches=2))


def difference(a, b) -> float:
    pairs = zip(a, b, strict=True)
    return max(((x - y).abs().max() / x.abs().max()).item() for x, y in pairs)


def started(**kwargs) -> nn.Module:
    """A backbone with RFAConv, started from ``plain_backbone``; its norms use batches."""
    net = Toy(norm_eval=False, **kwargs).backbone
    net.load_state_dict(plain_backbone().state_dict())
    return net.train()


def plain_twin() -> nn.Module:
    plain = plain_backbone()
    plain.norm_eval = False
    plain.train()
    return plain


def inner_norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {n: m.norm for n, m in model.named_modules() if isinstance(m, RFAConv)}


def calibrated_on(net: nn.Module, batches) -> nn.Module:
    layers, seen = calibrate(net, [lambda x=x: net(x) for x in batches])
    assert (layers, seen) == (len(inner_norms(net)), len(batches))
    return net


# --------------------------------------------------------------------------- what it computes


@torch.no_grad()
@pytest.mark.parametrize("number", [1, 3])
def test_on_running_statistics_it_stays_the_plain_net(number):
    net = calibrated_on(started(), pictures(8 * number).split(8))
    assert not uncalibrated(net)
    plain, x = plain_backbone(), pictures(4, seed=1)
    plain.eval()  # which returns None
    assert difference(plain(x), net.eval()(x)) <= 1e-5


@torch.no_grad()
def test_on_the_one_batch_that_it_saw_it_is_the_plain_net_in_training_mode():
    x = pictures(8)
    # Before, it is far from it.
    assert difference(plain_twin()(x), started()(x)) > 0.1
    assert difference(plain_twin()(x), calibrated_on(started(), [x])(x)) <= 1e-4


@torch.no_grad()
def test_over_several_batches_the_error_is_that_of_their_statistics():
    """A batch's mean and deviation are estimates, whose error falls with the root of its size.

    1e-2 takes some 1e4 values that know nothing of each other for each channel. Neighbours in a
    picture do: 1024 pictures, 8 x 8 each in layer2, are enough, 8 of them are not.
    """
    errors = {}
    for batch in (8, 1024):
        batches = pictures(2 * batch, seed=2).split(batch)
        net, plain = calibrated_on(started(), batches), plain_twin()
        errors[batch] = max(difference(plain(x), net(x)) for x in batches)
    assert errors[1024] <= 1e-2
    root = (1024 / 8) ** 0.5
    assert root / 3 < errors[8] / errors[1024] < root * 3


@torch.no_grad()
@pytest.mark.parametrize("layer", [RFAConv, RFCBAMConv, RFCAConv])
@pytest.mark.parametrize("floor", [0.0, -2.0])
def test_every_layer_with_features(layer, floor):
    torch.manual_seed(0)
    plain = nn.Conv2d(4, 6, 3, padding=1)
    net = layer(4, 6, 3, input_floor=floor)
    net.load_state_dict(plain.state_dict())
    x = 3 * torch.rand(8, 4, 9, 9) + floor
    assert calibrate(net, [lambda: net(x)]) == (1, 1)
    # In eval first: a run on the batch moves the running statistics.
    assert difference([plain(x)], [net.eval()(x)]) <= 1e-5
    assert difference([plain(x)], [net.train()(x)]) <= 1e-4


@torch.no_grad()
def test_a_layer_that_runs_on_several_levels_is_set_by_their_mean():
    """As the convolutions of a RetinaHead, which are shared over the levels of a pyramid."""
    layer = RFAConv(4, 6, 3)
    layer.load_state_dict(nn.Conv2d(4, 6, 3).state_dict())
    levels = [torch.rand(2, 4, side, side) for side in (16, 8, 4)]
    assert calibrate(layer, [lambda: [layer(x) for x in levels]] * 2) == (1, 2)
    features = [layer.feature(x) for x in levels]
    mean = torch.stack([f.mean((0, 2, 3)) for f in features]).mean(0)
    variance = torch.stack([f.var((0, 2, 3), correction=0) for f in features]).mean(0)
    torch.testing.assert_close(layer.norm.running_mean, mean)
    torch.testing.assert_close(layer.norm.running_var, variance)
    torch.testing.assert_close(layer.norm.weight, (variance + layer.norm.eps).sqrt())
    torch.testing.assert_close(layer.norm.bias, mean)


@torch.no_grad()
def test_branches_that_no_batch_reaches_and_empty_batches():
    plain = nn.Conv2d(4, 4, 3)
    net = nn.ModuleList(RFAConv(4, 4, 3) for _ in range(2))
    for layer in net:
        layer.load_state_dict(plain.state_dict())
    before = copy.deepcopy(net[1].state_dict())
    x = torch.rand(2, 4, 8, 8)
    # Regions are none in the second batch.
    assert calibrate(net, [lambda: net[0](x), lambda: net[0](x[:0])]) == (2, 2)
    assert list(uncalibrated(net)) == ["1"]
    assert all(torch.equal(v, before[k]) for k, v in net[1].state_dict().items())
    torch.testing.assert_close(net[0].norm.running_mean, net[0].feature(x).mean((0, 2, 3)))


# --------------------------------------------------------------------------- what it leaves alone


@torch.no_grad()
def test_nothing_else_changes():
    toy = Toy(norm_eval=False)
    toy.backbone.load_state_dict(plain_backbone().state_dict())
    toy.train()
    before = copy.deepcopy(toy.state_dict())
    modes = {n: m.training for n, m in toy.named_modules()}
    x = list(pictures(8))
    calibrate(toy, [lambda: toy(x, mode="loss")] * 2)
    changed = {k for k, v in toy.state_dict().items() if not torch.equal(v, before[k])}
    own = ("weight", "bias", "running_mean", "running_var")
    norms = inner_norms(toy)
    assert len(norms) == 4
    assert changed == {f"{name}.norm.{key}" for name in norms for key in own}
    assert modes == {n: m.training for n, m in toy.named_modules()}
    assert not any(m._forward_pre_hooks for m in norms.values())


@torch.no_grad()
def test_after_an_error_everything_is_as_it_was():
    net = started()
    before = copy.deepcopy(net.state_dict())

    def fail():
        net(pictures(4))
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        calibrate(net, [fail])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    for norm in inner_norms(net).values():
        assert norm.training
        assert not norm._forward_pre_hooks


# --------------------------------------------------------------------------- in a run


@pytest.fixture
def messages(monkeypatch) -> list[str]:
    found = []
    monkeypatch.setattr(calibration_hook, "print_log", lambda text, logger: found.append(text))
    return found


def train(work_dir, hooks=HOOKS_OF_A_RUN, norm_eval=False, epochs=1, **kwargs):
    """Train the toy; return its state when training begins and its Runner."""
    kept = {}
    look = Recorder(lambda runner: kept.update(copy.deepcopy(runner.model.state_dict())))
    model = Toy(norm_eval=norm_eval)
    runner = make_runner(model, work_dir, [*hooks, look], epochs=epochs, **kwargs)
    runner.train()
    return kept, runner


def test_a_run_from_a_plain_checkpoint_is_calibrated(tmp_path, messages):
    state, runner = train(tmp_path / "run", load_from=plain_file(tmp_path / "plain.pth"))
    (message,) = messages
    pattern = (
        r"Calibrated the batch norms of 4 warm-started layers on 2 batches; the loss of the last "
        r"is ([\d.]+) now, and ([\d.]+) as the plain convolutions compute"
    )
    now, before = map(float, re.fullmatch(pattern, message).groups())
    assert now == pytest.approx(before, rel=0.2)  # 2 batches of 4
    # By the batches of the first epoch, in its order.
    toy = Toy(norm_eval=False)
    toy.load_state_dict(torch.load(tmp_path / "plain.pth")["state_dict"])
    toy.train()
    batches = list(runner.train_dataloader)  # the sampler's epoch is still 0
    calibrate(toy, [lambda d=d: toy(d["inputs"], mode="loss") for d in batches])
    own = toy.state_dict()
    assert all(torch.equal(state[k], own[k]) for k in own)


@pytest.mark.parametrize("why", ["norm_eval", "resume", "scratch", "own"])
def test_a_run_without_such_norms_is_left_alone(why, tmp_path, messages):
    plain = plain_file(tmp_path / "plain.pth")
    kwargs = dict(load_from=plain)
    if why in ("resume", "own"):
        train(tmp_path / "run", load_from=plain)
        last = tmp_path / "run" / "epoch_1.pth"
        kwargs = dict(load_from=str(last), resume=why == "resume", epochs=2)
    if why == "norm_eval":
        kwargs["norm_eval"] = True
    if why == "scratch":
        kwargs = {}
    messages.clear()
    with_hook, _ = train(tmp_path / "with", **kwargs)
    assert messages == []
    without, _ = train(tmp_path / "without", hooks=HOOKS_OF_A_RUN[:1], **kwargs)
    assert with_hook.keys() == without.keys()
    assert all(torch.equal(with_hook[k], without[k]) for k in without)


def test_a_written_warm_start_is_calibrated_as_well(tmp_path, messages):
    """tools/retrofit_checkpoint.py writes the layers' own names."""
    toy = Toy()
    toy.load_state_dict(torch.load(plain_file(tmp_path / "plain.pth"))["state_dict"])
    torch.save(dict(state_dict=toy.state_dict(), meta={}), tmp_path / "own.pth")
    train(tmp_path / "run", load_from=str(tmp_path / "own.pth"))
    assert len(messages) == 1


@pytest.mark.parametrize("batches", [0, -1, 1.5, "16", True, None])
def test_batches_is_checked(batches):
    message = rf"^CalibrationHook: batches={re.escape(repr(batches))}: must be a positive int$"
    with pytest.raises(ConfigError, match=message):
        CalibrationHook(batches=batches)
    assert HOOKS.build(dict(type="CalibrationHook", batches=3)).batches == 3


# --------------------------------------------------------------------------- two processes


def in_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    plain = nn.Conv2d(4, 4, 3)
    net = nn.ModuleList(RFAConv(4, 4, 3) for _ in range(2))
    for layer in net:
        layer.load_state_dict(plain.state_dict())
    x = torch.load(f"{folder}/x{rank}.pth")
    # Only the second process reaches the second layer, as with a branch for rare objects.
    calibrate(net, [lambda: [layer(x) for layer in net[: rank + 1]]])
    torch.save({k: v for k, v in net.state_dict().items() if ".norm." in k}, f"{folder}/{rank}.pth")
    os._exit(0)  # gloo's threads may hang or crash at the end of a process


def test_processes_share_what_they_see(tmp_path):
    torch.manual_seed(0)
    maps = [torch.rand(2, 4, 8, 8), 2 + 3 * torch.rand(2, 4, 8, 8)]
    for rank, x in enumerate(maps):
        torch.save(x, tmp_path / f"x{rank}.pth")
    # Forked, as importing everything anew takes far longer than the test.
    mp.start_processes(in_process, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    layer = RFAConv(4, 4, 3)
    layer.load_state_dict(nn.Conv2d(4, 4, 3).state_dict())
    with torch.no_grad():
        means = [layer.feature(x).mean((0, 2, 3)) for x in maps]
    torch.testing.assert_close(first["0.norm.running_mean"], (means[0] + means[1]) / 2)
    torch.testing.assert_close(first["1.norm.running_mean"], means[1])


LOOK = """
import os
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class LookHook(Hook):
    priority = "LOWEST"

    def before_train(self, runner):
        torch.save(runner.model.module.state_dict(), os.environ["KEEP"] + f"/{runner.rank}.pth")
"""


@pytest.mark.slow
def test_train_calibrates_two_processes_alike(tiny_config, run_tool, tmp_path):
    (tmp_path / "look.py").write_text(LOOK)
    save_plain_detector(tiny_config, tmp_path / "plain.pth")
    config = tmp_path / "two.py"
    config.write_text(
        f'_base_ = "{tiny_config}"\n'
        'custom_imports = dict(imports=["rfa_mmdet", "look"])\n'
        'custom_hooks = [dict(type="LookHook")]\n'
        f'load_from = "{tmp_path}/plain.pth"\n'
        "train_cfg = dict(max_epochs=1, val_interval=9)\n"
    )
    done = run_tool(
        *("bash", "tools/dist_train.sh", config, 2, "--work-dir", tmp_path / "work"),
        PYTHONPATH=str(tmp_path),
        KEEP=str(tmp_path),
        PORT=free_port(),
    )
    assert done.returncode == 0, done.stdout
    assert "Calibrated the batch norms of 6 warm-started layers on 2 batches" in done.stdout
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    moved = [k for k in first if k.endswith("conv1.norm.running_mean") and first[k].any()]
    assert len(moved) == 6
    plain = torch.load(tmp_path / "plain.pth")["state_dict"]
    others = [k for k in first if k.endswith("running_mean") and k not in moved]
    assert others
    assert all(torch.equal(first[k], plain[k]) for k in others)
