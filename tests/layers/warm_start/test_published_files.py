"""Published checkpoints load directly, with the outputs of the published layers."""

import copy

import pytest
import torch
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_checkpoint

from rfa_mmdet.layers.warm_start.published_names import (
    PUBLISHED,
)
from rfa_mmdet.layers.warm_start.start import WarmStartError
from tests.helpers.published import (
    THEIRS,
    Detector,
    assert_same,
    build,
    feature_map,
    image,
    published_detector,
    randomise,
)


@pytest.fixture(params=THEIRS)
def system(request) -> str:
    return request.param


@pytest.mark.parametrize(
    ("k", "stride", "bias", "c", "o"),
    [(3, 1, True, 32, 8), (3, 2, False, 64, 24), (5, 2, True, 32, 40)],
)
def test_published_layer_loads_directly(system, k, stride, bias, c, o):
    theirs = randomise(THEIRS[system](c, o, k, stride, bias))
    layer = build(system, c, o, k, stride, bias=bias)
    x = feature_map(c)
    assert not torch.allclose(layer(x), theirs(x))
    state = theirs.state_dict()
    before = list(state)
    layer.load_state_dict(state, strict=True)
    assert_same(layer(x), theirs(x))
    assert list(state) == before  # the caller's dict


def test_norm_statistics_are_loaded(system):
    theirs = randomise(THEIRS[system](32, 8, 3))
    layer = build(system, 32, 8, 3)
    layer.load_state_dict(theirs.state_dict())
    state = layer.state_dict()
    for published, name in PUBLISHED[system].items():
        assert torch.equal(state[name], theirs.state_dict()[published]), name


def test_file_without_num_batches_tracked(system):
    theirs = randomise(THEIRS[system](32, 8, 3))
    # Without _metadata, like a file of that time.
    state = {k: v for k, v in theirs.state_dict().items() if not k.endswith("batches_tracked")}
    layer = build(system, 32, 8, 3)
    layer.load_state_dict(state, strict=True)
    assert_same(layer(feature_map(32)), theirs(feature_map(32)))


def test_own_state_dict_round_trip(system):
    a, b = build(system, 32, 8, 3, seed=1), build(system, 32, 8, 3, seed=2)
    names = list(b.state_dict())
    b.load_state_dict(a.state_dict(), strict=True)
    assert list(b.state_dict()) == names
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_wrong_shape_raises_with_both_shapes(system):
    state = THEIRS[system](32, 8, 3).state_dict()
    layer = MODELS.get(system)(32, 16, 3)
    message = r"^conv\.weight: .*\(8, 32, 3, 3\), but the \w+ .* needs \(16, 32, 3, 3\)$"
    with pytest.raises(WarmStartError, match=message):
        layer.load_state_dict(state, strict=True)


def test_unexpected_bias_is_named(system):
    state = THEIRS[system](32, 8, 3).state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"conv\.bias"'):
        MODELS.get(system)(32, 8, 3, bias=False).load_state_dict(state, strict=True)


def test_file_of_another_layer_raises(system):
    for name in set(THEIRS) - {system}:
        state = THEIRS[name](32, 8, 3).state_dict()
        with pytest.raises(RuntimeError, match=r"Unexpected key|Missing key"):
            MODELS.get(system)(32, 8, 3).load_state_dict(state, strict=True)


def test_both_names_of_one_parameter_raise(system):
    theirs, layer = THEIRS[system](32, 8, 3), MODELS.get(system)(32, 8, 3)
    state = {**theirs.state_dict(), "conv.weight": layer.conv.weight}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"conv\.0\.weight"'):
        layer.load_state_dict(state, strict=True)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_detector_loads_through_mmengine(system, prefix, tmp_path):
    theirs, detector = published_detector(system), randomise(Detector(system), 4)
    state = {prefix + key: value for key, value in theirs.state_dict().items()}
    file = tmp_path / "published.pth"
    torch.save(dict(state_dict=state, meta=dict(epoch=3)), file)
    assert not torch.allclose(detector(image()), theirs(image()))
    load_checkpoint(detector, str(file), map_location="cpu", strict=True)
    assert_same(detector(image()), theirs(image()))


def test_published_detector_loads_through_a_runners_load_from(tmp_path):
    theirs, detector = published_detector("RFCAConv"), randomise(Detector("RFCAConv"), 4)
    before = copy.deepcopy(detector.state_dict())
    torch.save(theirs.state_dict(), tmp_path / "published.pth")
    runner = Runner(
        detector,
        str(tmp_path / "work"),
        load_from=str(tmp_path / "published.pth"),
        default_scope="mmdet",
        experiment_name="test_published_files",
        log_level="ERROR",
    )
    runner.load_or_resume()
    assert_same(runner.model.double().eval()(image()), theirs(image()))
    after = detector.state_dict()
    assert list(after) == list(before)
    assert not any(torch.equal(before[name], value) for name, value in after.items())
