"""Published checkpoints load as they are, and compute what the published layers compute.

The published layers are written here anew, from the papers' formulas and the list of key names.
"""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_checkpoint
from torch import Tensor, nn

import rfa_mmdet.models
from rfa_mmdet.layers.warm_start.published_names import (
    PUBLISHED,
    find_published,
    published_weights,
    rename_published,
)
from rfa_mmdet.layers.warm_start.start import WarmStartError

# --------------------------------------------------------------------------- the published layers


def side_by_side(x: Tensor, k: int) -> Tensor:
    """(B, C, K, h, w) to (B, C, h * k, w * k)."""
    b, c, _, h, w = x.shape
    return x.view(b, c, k, k, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c, h * k, w * k)


class PublishedRFAConv(nn.Module):
    def __init__(self, c, o, k, stride=1, bias=True):
        super().__init__()
        self.k, wide = k, c * k * k
        self.get_weight = nn.Sequential(
            nn.AvgPool2d(k, stride, k // 2), nn.Conv2d(c, wide, 1, groups=c, bias=False)
        )
        self.generate_feature = nn.Sequential(
            nn.Conv2d(c, wide, k, stride, k // 2, groups=c, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
        )
        self.conv = nn.Sequential(nn.Conv2d(c, o, k, stride=k, bias=bias))

    def forward(self, x):
        weight = self.get_weight(x).unflatten(1, (x.shape[1], -1)).softmax(2)
        feature = self.generate_feature(x).unflatten(1, (x.shape[1], -1))
        return self.conv(side_by_side(feature * weight, self.k))


class Generates(nn.Module):
    def __init__(self, c, o, k, stride, bias):
        super().__init__()
        self.k, wide = k, c * k * k
        self.generate = nn.Sequential(
            nn.Conv2d(c, wide, k, stride, k // 2, groups=c, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
        )
        self.conv = nn.Sequential(nn.Conv2d(c, o, k, stride=k, bias=bias))

    def windows(self, x):
        return side_by_side(self.generate(x).unflatten(1, (x.shape[1], -1)), self.k)


class PublishedSE(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(c, 16, bias=False), nn.ReLU(), nn.Linear(16, c, bias=False), nn.Sigmoid()
        )

    def forward(self, x):
        return self.fc(x.mean((2, 3)))[:, :, None, None]


class PublishedRFCBAMConv(Generates):
    def __init__(self, c, o, k, stride=1, bias=True):
        super().__init__(c, o, k, stride, bias)
        self.get_weight = nn.Sequential(nn.Conv2d(2, 1, 3, padding=1, bias=False), nn.Sigmoid())
        self.se = PublishedSE(c)

    def forward(self, x):
        windows = self.windows(x)
        pooled = [windows.max(1, keepdim=True).values, windows.mean(1, keepdim=True)]
        return self.conv(windows * self.se(x) * self.get_weight(torch.cat(pooled, 1)))


def add_coordinate(layer: nn.Module, c: int) -> None:
    hidden = max(8, c // 32)
    layer.conv1 = nn.Conv2d(c, hidden, 1)
    layer.bn1 = nn.BatchNorm2d(hidden)
    layer.conv_h = nn.Conv2d(hidden, c, 1)
    layer.conv_w = nn.Conv2d(hidden, c, 1)


def coordinate(layer: nn.Module, x: Tensor) -> Tensor:
    rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)
    y = layer.bn1(layer.conv1(torch.cat([rows, columns], 2)))
    y = y * (y + 3).clamp(0, 6) / 6
    y_h, y_w = y.split([x.shape[2], x.shape[3]], 2)
    a_h, a_w = layer.conv_h(y_h).sigmoid(), layer.conv_w(y_w.transpose(2, 3)).sigmoid()
    return x * a_w * a_h


class PublishedRFCAConv(Generates):
    def __init__(self, c, o, k, stride=1, bias=True):
        super().__init__(c, o, k, stride, bias)
        add_coordinate(self, c)

    def forward(self, x):
        return self.conv(coordinate(self, self.windows(x)))


class PublishedCAConv(nn.Module):
    def __init__(self, c, o, k, stride=1, bias=True):
        super().__init__()
        add_coordinate(self, c)
        self.conv = nn.Sequential(nn.Conv2d(c, o, k, stride, k // 2, bias=bias))

    def forward(self, x):
        return self.conv(coordinate(self, x))


class PublishedCAMConv(nn.Module):
    def __init__(self, c, o, k, stride=1, bias=True):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(c, c // 16, 1, bias=False), nn.ReLU(), nn.Conv2d(c // 16, c, 1, bias=False)
        )
        self.conv = nn.Sequential(nn.Conv2d(c, o, k, stride, k // 2, bias=bias))

    def weigh(self, x):
        most, mean = x.amax((2, 3), keepdim=True), x.mean((2, 3), keepdim=True)
        return x * (self.mlp(most) + self.mlp(mean)).sigmoid()

    def forward(self, x):
        return self.conv(self.weigh(x))


class PublishedCBAMConv(PublishedCAMConv):
    def __init__(self, c, o, k, stride=1, bias=True):
        super().__init__(c, o, k, stride, bias)
        self.spatital = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def weigh(self, x):
        x = super().weigh(x)
        pooled = torch.cat([x.max(1, keepdim=True).values, x.mean(1, keepdim=True)], 1)
        return x * self.spatital(pooled).sigmoid()


THEIRS = {
    "RFAConv": PublishedRFAConv,
    "RFCBAMConv": PublishedRFCBAMConv,
    "RFCAConv": PublishedRFCAConv,
    "CAMConv": PublishedCAMConv,
    "CBAMConv": PublishedCBAMConv,
    "CAConv": PublishedCAConv,
}
# As the list of published names gives them, '*' for all that a convolution or norm has.
CONV, NORM = ("weight", "bias"), ("weight", "bias", "running_mean", "running_var")
KEYS = {
    "RFAConv": "get_weight.1.weight generate_feature.0.weight generate_feature.1.* conv.0.*",
    "RFCBAMConv": "generate.0.weight generate.1.* get_weight.0.weight se.fc.0.weight "
    "se.fc.2.weight conv.0.*",
    "RFCAConv": "generate.0.weight generate.1.* conv1.* bn1.* conv_h.* conv_w.* conv.0.*",
    "CAMConv": "mlp.0.weight mlp.2.weight conv.0.*",
    "CBAMConv": "mlp.0.weight mlp.2.weight spatital.weight conv.0.*",
    "CAConv": "conv1.* bn1.* conv_h.* conv_w.* conv.0.*",
}


def listed_keys(system: str) -> set[str]:
    keys = set()
    for name in KEYS[system].split():
        module, _, leaf = name.rpartition(".")
        is_norm = module in ("generate_feature.1", "generate.1", "bn1")
        leaves = ((*NORM, "num_batches_tracked") if is_norm else CONV) if leaf == "*" else (leaf,)
        keys |= {f"{module}.{leaf}" for leaf in leaves}
    return keys


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic a value that would be noticed elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            value.fill_(seed + 5)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2, generator=generator)
        else:
            # Small fans keep gates away from 0 and 1.
            value.normal_(0, (1 / max(1, value[0].numel())) ** 0.5, generator=generator)
            value += 0.1
    return module.double().eval()


def build(system: str, *args, seed: int = 1, **kwargs) -> nn.Module:
    return randomise(MODELS.get(system)(*args, **kwargs), seed)


def feature_map(c: int, size: tuple[int, int] = (9, 12)) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2, c, *size, dtype=torch.float64, generator=generator)


def assert_same(a: Tensor, b: Tensor) -> None:
    assert a.std() > 1e-3  # no comparison of zeros
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.fixture(params=THEIRS)
def system(request) -> str:
    return request.param


# --------------------------------------------------------------------------- the table


def test_the_layers_here_have_the_published_names(system):
    assert set(THEIRS[system](32, 8, 3).state_dict()) == listed_keys(system)


def test_table_gives_every_published_name_its_own_place_in_ours(system):
    renamed = PUBLISHED[system]
    assert set(renamed) == listed_keys(system)
    assert len(set(renamed.values())) == len(renamed)
    assert set(renamed.values()) == set(build(system, 32, 8, 3).state_dict())


def test_our_names_are_never_taken_for_published_ones(system):
    for bias in (True, False):
        state = build(system, 32, 8, 3, bias=bias).state_dict()
        before = dict(state)
        assert find_published(state) == {}
        for name in PUBLISHED:
            assert rename_published(name, state, "") == 0
        assert list(state.items()) == list(before.items())


# --------------------------------------------------------------------------- one layer


@pytest.mark.parametrize(
    ("k", "stride", "bias", "c", "o"),
    [(3, 1, True, 32, 8), (3, 2, False, 64, 24), (5, 2, True, 32, 40)],
)
def test_published_layer_loads_as_it_is(system, k, stride, bias, c, o):
    theirs = randomise(THEIRS[system](c, o, k, stride, bias))
    layer = build(system, c, o, k, stride, bias=bias)
    x = feature_map(c)
    assert not torch.allclose(layer(x), theirs(x))
    state = theirs.state_dict()
    before = list(state)
    layer.load_state_dict(state, strict=True)
    assert_same(layer(x), theirs(x))
    assert list(state) == before  # the caller's


def test_norm_statistics_arrive_whole(system):
    theirs = randomise(THEIRS[system](32, 8, 3))
    layer = build(system, 32, 8, 3)
    layer.load_state_dict(theirs.state_dict())
    state = layer.state_dict()
    for published, name in PUBLISHED[system].items():
        assert torch.equal(state[name], theirs.state_dict()[published]), name


def test_file_from_before_batches_were_counted(system):
    theirs = randomise(THEIRS[system](32, 8, 3))
    # Without _metadata, like a file of that time.
    state = {k: v for k, v in theirs.state_dict().items() if not k.endswith("batches_tracked")}
    layer = build(system, 32, 8, 3)
    layer.load_state_dict(state, strict=True)
    assert_same(layer(feature_map(32)), theirs(feature_map(32)))


def test_our_own_round_trip(system):
    a, b = build(system, 32, 8, 3, seed=1), build(system, 32, 8, 3, seed=2)
    names = list(b.state_dict())
    b.load_state_dict(a.state_dict(), strict=True)
    assert list(b.state_dict()) == names
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_wrong_shape_is_refused_with_both_shapes(system):
    state = THEIRS[system](32, 8, 3).state_dict()
    layer = MODELS.get(system)(32, 16, 3)
    message = r"^conv\.weight: .*\(8, 32, 3, 3\), but the \w+ .* needs \(16, 32, 3, 3\)$"
    with pytest.raises(WarmStartError, match=message):
        layer.load_state_dict(state, strict=True)


def test_bias_that_the_layer_lacks_is_named(system):
    state = THEIRS[system](32, 8, 3).state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"conv\.bias"'):
        MODELS.get(system)(32, 8, 3, bias=False).load_state_dict(state, strict=True)


def test_file_of_another_system_is_refused(system):
    for name in set(THEIRS) - {system}:
        state = THEIRS[name](32, 8, 3).state_dict()
        with pytest.raises(RuntimeError, match=r"Unexpected key|Missing key"):
            MODELS.get(system)(32, 8, 3).load_state_dict(state, strict=True)


def test_both_names_of_one_parameter_are_refused(system):
    theirs, layer = THEIRS[system](32, 8, 3), MODELS.get(system)(32, 8, 3)
    state = {**theirs.state_dict(), "conv.weight": layer.conv.weight}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"conv\.0\.weight"'):
        layer.load_state_dict(state, strict=True)


# --------------------------------------------------------------------------- names of other layers

STEM = ["conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"]
FOREIGN = [
    *STEM,
    *("fc.weight", "mlp.0.bias", "mlp.4.weight", "generate.0.bias", "conv.1.weight"),
    *("xconv_h.weight", "gn.weight", "conv1x1.bias", "conv3x3.weight", "linear1.weight"),
]


def test_a_layer_without_prefix_leaves_a_resnets_stem_alone():
    for system in PUBLISHED:
        state = dict.fromkeys([*STEM, "fc.weight", "layer1.0.conv1.weight", "conv.0.weight"], 0)
        assert rename_published(system, state, "") == 0
        assert find_published(state) == {}


def test_unknown_system():
    state = {"conv.0.weight": 0}
    assert rename_published("RFAConvOfMine", state, "") == 0
    assert list(state) == ["conv.0.weight"]


@pytest.mark.parametrize(
    "others",
    [
        ["mlp.0.bias", "mlp.2.bias"],  # linear layers of some transformer
        ["conv.1.weight", "conv.1.bias"],
        ["attention.mlp.0.weight"],
    ],
)
def test_modules_that_only_look_like_one_are_not_found(others):
    keys = ["a.mlp.0.weight", "a.mlp.2.weight", "a.conv.0.weight", *(f"a.{k}" for k in others)]
    assert find_published(keys) == {}


def test_part_of_a_longer_name_is_not_found():
    names = ["mlp.0.weight", "mlp.2.weight", "conv.0.weight"]
    assert find_published([f"x{name}" for name in names]) == {}
    assert find_published([f"a.x{name}" for name in names]) == {}
    assert find_published([f"a.b.{name}" for name in names]) == {"a.b.": "CAMConv"}


PREFIXES = st.lists(
    st.sampled_from(
        ["module", "backbone", "layer1", "0", "10", "conv", "conv1", "mlp", "generate"]
    ),
    min_size=1,
    max_size=4,
).map(lambda parts: ".".join(parts) + ".")


@given(
    placed=st.dictionaries(PREFIXES, st.sampled_from(sorted(PUBLISHED)), max_size=5),
    foreign=st.lists(st.tuples(st.just("") | PREFIXES, st.sampled_from(FOREIGN)), max_size=8),
    bias=st.booleans(),
    shuffle=st.randoms(use_true_random=False),
)
def test_layers_are_found_and_renamed_wherever_they_are(placed, foreign, bias, shuffle):
    # A module inside another one, or of another kind in the same place, is no published layer.
    inside = [(a, b) for a in placed for b in placed if a != b and a.startswith(b)]
    placed = {p: s for p, s in placed.items() if p not in {a for a, _ in inside}}
    expected, others = {}, []
    for prefix, system in placed.items():
        names = [n for n in PUBLISHED[system] if bias or n != "conv.0.bias"]
        expected |= {prefix + n: prefix + PUBLISHED[system][n] for n in names}
    for prefix, name in foreign:
        if not any((prefix + name).startswith(p) for p in placed):
            others.append(prefix + name)
    keys = sorted({*expected, *others})
    shuffle.shuffle(keys)
    state = {key: key for key in keys}

    found = find_published(keys)
    assert found == placed
    changed = sum(rename_published(system, state, prefix) for prefix, system in found.items())
    assert changed == sum(old != new for old, new in expected.items())
    assert state == {expected.get(key, key): key for key in keys}
    assert find_published(state) == {}  # nothing to be done twice


@given(
    system=st.sampled_from(sorted(PUBLISHED)),
    prefix=st.just("") | PREFIXES,
    data=st.data(),
)
def test_incomplete_layers_are_left_alone(system, prefix, data):
    weights = published_weights(system)
    missing = data.draw(st.sets(st.sampled_from(weights), min_size=1))
    state = dict.fromkeys([prefix + n for n in PUBLISHED[system] if n not in missing], 0)
    before = list(state)
    assert rename_published(system, state, prefix) == 0
    assert list(state) == before
    assert system not in find_published(state).values()


def test_cost_of_a_layer_does_not_grow_with_the_file():
    class Counting(dict):
        looked_up = 0

        def __contains__(self, key):
            self.looked_up += 1
            return super().__contains__(key)

        def __iter__(self):
            raise AssertionError("went through the whole file")

        keys = items = values = __iter__

    for system in PUBLISHED:
        names = {f"a.{name}": 0 for name in PUBLISHED[system]}
        state = Counting({**names, **{f"b.{i}.weight": 0 for i in range(1000)}})
        assert rename_published(system, state, "a.") > 0
        assert state.looked_up < 60


# --------------------------------------------------------------------------- a whole detector


class Head(nn.Module):
    """Names that also occur in published layers, but are none."""

    def __init__(self, c):
        super().__init__()
        self.conv1 = nn.Conv2d(c, c, 1)
        self.bn1 = nn.BatchNorm2d(c)
        self.conv = nn.Sequential(nn.Conv2d(c, 4, 1))

    def forward(self, x):
        return self.conv(self.bn1(self.conv1(x)))


class Detector(nn.Module):
    def __init__(self, system):
        super().__init__()
        plugin = dict(cfg=dict(type="EMA", factor=8), position="after_conv1")
        conam = dict(type="ConAM", patch_size=2, hidden_channels=4)
        self.backbone = rfa_mmdet.models.RFAResNet(
            18,
            base_channels=16,
            num_stages=2,
            strides=(1, 2),
            dilations=(1, 1),
            out_indices=(0, 1),
            rfa=dict(type=system, bias=True),
            plugins=[plugin, dict(cfg=conam, position="after_conv2")],
        )
        self.bbox_head = Head(32)

    def forward(self, x):
        return self.bbox_head(self.backbone(x)[-1])


def published_detector(system: str) -> nn.Module:
    """The same detector, of published layers."""
    detector = Detector(system)
    for stage in (detector.backbone.layer1, detector.backbone.layer2):
        for block in stage:
            conv = block.conv1
            block.conv1 = THEIRS[system](conv.in_channels, conv.out_channels, 3, conv.stride[0])
    return randomise(detector, 3)


def image() -> Tensor:
    return feature_map(3, (48, 64))


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
        experiment_name="test_checkpoint_keys",
        log_level="ERROR",
    )
    runner.load_or_resume()
    assert_same(runner.model.double().eval()(image()), theirs(image()))
    after = detector.state_dict()
    assert list(after) == list(before)
    assert not any(torch.equal(before[name], value) for name, value in after.items())


def test_every_layer_of_a_detector_is_found(system):
    found = find_published(published_detector(system).state_dict())
    blocks = [f"backbone.layer{stage}.{block}.conv1." for stage in (1, 2) for block in (0, 1)]
    assert found == dict.fromkeys(blocks, system)
    assert find_published(Detector(system).state_dict()) == {}
