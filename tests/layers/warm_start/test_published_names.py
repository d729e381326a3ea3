"""All published names, and no others, are found and renamed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfa_mmdet.layers.warm_start.published_names import (
    PUBLISHED,
    find_published,
    published_weights,
    rename_published,
)
from tests.helpers.published import (
    THEIRS,
    Detector,
    build,
    published_detector,
)

# As in the list of published names; '*' stands for all values of a convolution or norm.
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


@pytest.fixture(params=THEIRS)
def system(request) -> str:
    return request.param


def test_reference_layers_have_the_published_names(system):
    assert set(THEIRS[system](32, 8, 3).state_dict()) == listed_keys(system)


def test_table_maps_every_published_name_to_one_of_ours(system):
    renamed = PUBLISHED[system]
    assert set(renamed) == listed_keys(system)
    assert len(set(renamed.values())) == len(renamed)
    assert set(renamed.values()) == set(build(system, 32, 8, 3).state_dict())


def test_own_names_are_not_mistaken_for_published_ones(system):
    for bias in (True, False):
        state = build(system, 32, 8, 3, bias=bias).state_dict()
        before = dict(state)
        assert find_published(state) == {}
        for name in PUBLISHED:
            assert rename_published(name, state, "") == 0
        assert list(state.items()) == list(before.items())


STEM = ["conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"]
FOREIGN = [
    *STEM,
    *("fc.weight", "mlp.0.bias", "mlp.4.weight", "generate.0.bias", "conv.1.weight"),
    *("xconv_h.weight", "gn.weight", "conv1x1.bias", "conv3x3.weight", "linear1.weight"),
]


def test_layer_without_prefix_does_not_match_a_resnets_stem():
    for system in PUBLISHED:
        state = dict.fromkeys([*STEM, "fc.weight", "layer1.0.conv1.weight", "conv.0.weight"], 0)
        assert rename_published(system, state, "") == 0
        assert find_published(state) == {}


def test_unknown_layer():
    state = {"conv.0.weight": 0}
    assert rename_published("RFAConvOfMine", state, "") == 0
    assert list(state) == ["conv.0.weight"]


@pytest.mark.parametrize(
    "others",
    [
        ["mlp.0.bias", "mlp.2.bias"],  # linear layers of a transformer
        ["conv.1.weight", "conv.1.bias"],
        ["attention.mlp.0.weight"],
    ],
)
def test_similar_modules_are_not_found(others):
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
def test_layers_are_found_and_renamed_at_any_prefix(placed, foreign, bias, shuffle):
    # Nested modules, or other modules at the same place, are not published layers.
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
    assert find_published(state) == {}  # nothing to rename again


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


def test_every_layer_of_a_detector_is_found(system):
    found = find_published(published_detector(system).state_dict())
    blocks = [f"backbone.layer{stage}.{block}.conv1." for stage in (1, 2) for block in (0, 1)]
    assert found == dict.fromkeys(blocks, system)
    assert find_published(Detector(system).state_dict()) == {}
