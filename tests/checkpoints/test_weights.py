"""Weights must match the model for testing; training warns about its start."""

import pytest
import torch
from mmdet.models import DetTTAModel
from mmengine.model import BaseModel
from torch import nn

from rfa_mmdet.checkpoints.weights import OwnWeightsRunner, StartHook, load_weights
from rfa_mmdet.errors import UserError
from rfa_mmdet.layers import SE
from tests.helpers.toy import Toy, make_runner, plain_file


class Small(BaseModel):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)
        self.other = nn.Linear(2, 2)

    def forward(self, inputs, mode="tensor"):
        return inputs


@pytest.fixture
def saved(tmp_path):
    """Save a modified state dict of Small."""

    def save(change=lambda state: state, **more):
        state = {key: torch.full_like(value, 2) for key, value in Small().state_dict().items()}
        path = tmp_path / "some.pth"
        torch.save(dict(meta={}, state_dict=change(state), **more), path)
        return str(path)

    return save


def loaded_for_test(path, model, tmp_path, **kwargs):
    runner = OwnWeightsRunner(model, str(tmp_path), experiment_name=path, **kwargs)
    runner.call_hook("before_run")
    runner.load_checkpoint(path)
    return runner


def ddp(state):
    return {f"module.{key}": value for key, value in state.items()}


def averaged(state):
    return {**state, **{f"ema_{key.replace('.', '_')}": state[key] for key in state}}


@pytest.mark.parametrize("change", [dict, ddp, averaged])
@pytest.mark.parametrize("hooks", [[], [dict(type="EMAHook")]])
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: DetTTAModel(module=model)])
def test_matching_weights_are_loaded(saved, tmp_path, change, hooks, wrap):
    runner = loaded_for_test(saved(change), wrap(Small()), tmp_path, custom_hooks=hooks)
    assert all((p == 2).all() for p in runner.model.parameters())
    runner.call_hook("before_test_epoch")  # EMAHook swaps its average in
    assert all((p == 2).all() for p in runner.model.parameters())


def test_constants_that_older_transformers_saved_are_ignored(saved, tmp_path):
    key = "language_model.language_backbone.body.model.embeddings.position_ids"
    file = saved(lambda s: {**s, key: torch.arange(4)})
    runner = loaded_for_test(file, Small(), tmp_path)
    assert all((p == 2).all() for p in runner.model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"a.b": torch.ones(1)}, r"4 parameters are missing .*conv\.weight.*e\.g\. a\.b"),
        (
            lambda s: {**s, "more.weight": torch.ones(1)},
            r"1 parameters are not in .*more\.weight",
        ),
        (lambda s: {**s, "conv.bias": torch.ones(3)}, r"size mismatch for conv\.bias"),
        (lambda s: {}, "contains no model weights"),
        (lambda s: {"a": 1}, "contains no model weights"),
    ],
)
def test_mismatched_weights_raise(saved, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        loaded_for_test(saved(change), Small(), tmp_path)


def test_plain_weights_start_new_layers(tmp_path):
    runner = loaded_for_test(plain_file(tmp_path / "plain.pth"), Toy(), tmp_path)
    assert runner.model.backbone.layer1[0].conv1.norm.running_mean is not None


def test_a_bare_state_dict_is_a_checkpoint(tmp_path):
    model = nn.Linear(2, 1)
    load_weights(model, {f"module.{k}": v * 0 for k, v in model.state_dict().items()}, "a.pth")
    assert not any(p.any() for p in model.parameters())


def test_another_start_of_a_plugin_does_not_fit():
    own, wrapped = nn.Sequential(SE(16, start="identity")), nn.Sequential()
    wrapped.module = own  # as in DDP
    for net in (own, wrapped):
        load_weights(nn.Sequential(SE(16, start="identity")), net.state_dict(), "a.pth")
        with pytest.raises(UserError, match=r"^checkpoint='a\.pth' does not fit .*: 0\.start: "):
            load_weights(nn.Sequential(SE(16)), net.state_dict(), "a.pth")


def trained(tmp_path, name, **kwargs):
    runner = make_runner(Toy(), tmp_path / name, [], **kwargs)
    runner.register_hook(StartHook())
    runner.train()
    return (tmp_path / name).glob("2*/*.log")


def test_load_from_another_model_raises(saved, tmp_path):
    with pytest.raises(UserError, match=r"none of its 4 parameters \(e\.g\. conv\.weight"):
        trained(tmp_path, "a", load_from=saved())


def test_load_from_with_few_matching_weights_warns(tmp_path):
    state = Toy().state_dict()
    path = tmp_path / "few.pth"
    torch.save({f"module.{key}": state[key] for key in list(state)[:5]}, path)
    (log,) = trained(tmp_path, "few", load_from=str(path))
    assert f"has only 5 of the model's {len(state)} parameters" in log.read_text()


def test_resuming_logs_that_the_configs_learning_rate_is_ignored(tmp_path):
    (log,) = trained(tmp_path, "a", lr=0.05)
    assert "--resume" not in log.read_text()
    path = tmp_path / "a" / "epoch_1.pth"
    (log,) = trained(tmp_path, "b", lr=0.5, epochs=2, resume=True, load_from=str(path))
    (line,) = [one for one in log.read_text().splitlines() if "--resume: " in one]
    assert "WARNING" in line
    assert "(learning rate 0.05 instead of 0.5)" in line
    assert f"load_from={path}" in line
    (log,) = trained(tmp_path, "c", epochs=1, resume=True, load_from=str(path))
    assert (
        "epoch_1.pth has already completed train_cfg.max_epochs=1; nothing left" in log.read_text()
    )
