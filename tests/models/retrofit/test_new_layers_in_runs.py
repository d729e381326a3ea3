"""What trains with DDP and after resuming: real Runners, processes and files."""

import pytest
import torch
from torch import nn

from rfa_mmdet.models import retrofit
from rfa_mmdet.models.retrofit.new_layers import ON_BATCHES, new_layers
from tests.helpers.ports import free_port
from tests.helpers.retrofitted import save_plain_detector
from tests.helpers.toy import Recorder, Toy, make_runner, plain_file

COORD = dict(type="CoordAtt")  # a plug-in with a BN in it
MORE = [dict(after=r"layer[12]\.\d", plugin=COORD)]


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def train(work_dir, epochs=1, **kwargs):
    """Train the toy; return its Runner, and what trained and used batches at the start."""
    seen = {}

    def look(runner):
        runner.model.train()  # like an epoch does
        seen["trained"] = trained(runner.model)
        seen["modes"] = {name: m.training for name, m in runner.model.named_modules()}

    model = kwargs.pop("model", None) or with_plugins()
    runner = make_runner(model, work_dir, [Recorder(look)], epochs=epochs, **kwargs)
    runner.train()
    return runner, seen


def with_plugins() -> Toy:
    toy = Toy(frozen_stages=1, norm_eval=True)
    torch.manual_seed(3)
    retrofit(toy.backbone, MORE)
    return toy


@pytest.fixture
def plain(tmp_path) -> str:
    return plain_file(tmp_path / "plain.pth")


# --------------------------------------------------------------------------- resume


def test_resumed_run_ends_with_the_same_weights(tmp_path, plain):
    whole, first = train(tmp_path / "whole", epochs=3, load_from=plain)
    train(tmp_path / "broken", epochs=1, load_from=plain)
    resumed, second = train(tmp_path / "broken", epochs=3, resume=True)
    conv = "backbone.layer1.0.conv1"
    assert {f"{conv}.{name}" for name in ("attention.weight", "conv.weight")} <= first["trained"]
    assert not first["modes"][f"{conv}.norm"]  # statistics of the warm start
    assert first["modes"]["backbone.layer1.0.coord_att.bn1"]  # and no others
    assert not first["modes"]["backbone.layer1.0.bn1"]
    assert second == first
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_run_from_scratch_resumes_with_norms_on_batches(tmp_path):
    whole, first = train(tmp_path / "whole", epochs=2)
    train(tmp_path / "broken", epochs=1)
    resumed, second = train(tmp_path / "broken", epochs=2, resume=True)
    assert first["modes"]["backbone.layer1.0.conv1.norm"]
    assert second == first
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_first_steps_resume_to_the_same_weights(tmp_path, plain):
    """Resume from each of three steps; the first checkpoint has just taken its statistics."""

    def run(name, **kwargs):
        model = Toy(norm_eval=False)
        return train(tmp_path / name, model=model, number=4, **kwargs)[0].model.state_dict()

    whole = run("whole", epochs=3, load_from=plain)
    run("broken", epochs=1, load_from=plain)
    resumed = run("broken", epochs=3, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert whole["backbone.layer1.0.conv1.norm.running_mean"].any()


def test_checkpoints_have_no_extra_keys(tmp_path, plain):
    train(tmp_path / "run", load_from=plain)
    checkpoint = torch.load(tmp_path / "run" / "epoch_1.pth", weights_only=False)
    assert checkpoint["state_dict"].keys() == with_plugins().state_dict().keys()
    places = [f"layer{s}.{i}.coord_att.bn1" for s in (1, 2) for i in (0, 1)]
    assert checkpoint["state_dict"]._metadata["backbone"][ON_BATCHES] == places
    # Nothing is recorded if everything trains.
    train(tmp_path / "free", model=Toy(norm_eval=False))
    checkpoint = torch.load(tmp_path / "free" / "epoch_1.pth", weights_only=False)
    assert ON_BATCHES not in checkpoint["state_dict"]._metadata["backbone"]


def test_new_layers_have_full_names():
    net = nn.ModuleDict(dict(a=Toy(), b=nn.Conv2d(3, 3, 3)))
    found = dict(new_layers(net))
    assert list(found) == [f"a.backbone.layer{s}.{i}.conv1" for s in (1, 2) for i in (0, 1)]
    assert all(net.get_submodule(name) is layer for name, layer in found.items())
    assert next(iter(dict(new_layers(net["a"].backbone)))) == "layer1.0.conv1"


# --------------------------------------------------------------------------- two processes

KEEP_WEIGHTS = """
import os
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class KeepWeightsHook(Hook):
    priority = "LOWEST"

    def keep(self, runner, when):
        module = runner.model.module
        names = [n for n, p in module.named_parameters() if p.requires_grad]
        kept = dict(state=module.state_dict(), trained=names)
        torch.save(kept, os.environ["KEEP"] + f"/{when}{runner.rank}.pth")

    def before_train(self, runner):
        self.keep(runner, "start")

    def after_train(self, runner):
        self.keep(runner, "end")
"""


@pytest.fixture(scope="module")
def two_processes(tiny_config, run_tool, tmp_path_factory):
    """Train the thin detector in two processes from a plain checkpoint; return their states."""
    root = tmp_path_factory.mktemp("two")
    (root / "keep_weights.py").write_text(KEEP_WEIGHTS)
    save_plain_detector(tiny_config, root / "plain.pth")
    config = root / "two.py"
    config.write_text(
        f'_base_ = "{tiny_config}"\n'
        'custom_imports = dict(imports=["rfa_mmdet", "keep_weights"])\n'
        'custom_hooks = [*_base_.custom_hooks, dict(type="KeepWeightsHook")]\n'
        f'load_from = "{root}/plain.pth"\n'
        "model = dict(backbone=dict(\n"
        "    frozen_stages=2, norm_eval=True, stage_with_rfa=(True, True, False, False)))\n"
        "train_cfg = dict(max_epochs=2, val_interval=9)\n"
    )

    def run(name, *arguments):
        (root / name).mkdir()
        done = run_tool(
            *("bash", "tools/dist_train.sh", config, 2, "--work-dir", root / name, *arguments),
            PYTHONPATH=str(root),
            KEEP=str(root / name),
            PORT=free_port(),
        )
        assert done.returncode == 0, done.stdout
        load = [
            torch.load(root / name / f"{when}{rank}.pth")
            for when in ("start", "end")
            for rank in (0, 1)
        ]
        return done.stdout, root / name, load

    return run


@pytest.fixture(scope="module")
def whole(two_processes):
    return two_processes("whole")


def test_ddp_handles_layers_frozen_by_a_checkpoint(whole):
    output, _, (start, start_1, end, end_1) = whole
    assert "[2][2/2]" in output  # the second step is where DDP would miss gradients
    assert start["trained"] == start_1["trained"] == end["trained"]
    parameters = [name for name in end["state"] if "running_" not in name]
    assert all(torch.equal(end["state"][n], end_1["state"][n]) for n in parameters)
    assert all(torch.equal(start["state"][n], start_1["state"][n]) for n in start["state"])
    changed = {n for n in start["state"] if not torch.equal(start["state"][n], end["state"][n])}
    conv = "backbone.layer1.0.conv1"
    new = {f"{conv}.{n}" for n in ("attention.weight", "feature.weight", "norm.weight")}
    assert new <= changed
    assert {n for n in changed if "running_" not in n and "num_batches" not in n} == set(
        start["trained"]
    )
    held = ("backbone.conv1.", "backbone.bn1.", "backbone.layer1.", "backbone.layer2.")
    in_frozen = {n for n in changed if n.startswith(held)}
    own = ("attention.weight", "feature.weight", "norm.weight", "norm.bias", "conv.weight")
    assert in_frozen == {
        f"backbone.layer{s}.{i}.conv1.{n}" for s in (1, 2) for i in (0, 1) for n in own
    }


@pytest.mark.slow
def test_resuming_in_two_processes_trains_the_same(whole, two_processes):
    _, work_dir, (start, _, end, _) = whole
    _, _, resumed = two_processes("resumed", "--resume", work_dir / "epoch_1.pth")
    assert resumed[0]["trained"] == start["trained"]
    assert not all(torch.equal(resumed[0]["state"][n], end["state"][n]) for n in end["state"])
    for kept in resumed[2:]:
        assert all(torch.equal(kept["state"][n], end["state"][n]) for n in end["state"])
