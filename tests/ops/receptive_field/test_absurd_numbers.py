"""Operators called directly raise for absurd windows, and no size overflows."""

import pytest
import torch

from tests.helpers.backends import require

GOOD = dict(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
LARGEST = 2**20
ABSURD = (-(2**63), -1, LARGEST + 1, 2**31, 2**32 + 1, 2**61, 2**62, 2**63 - 1)


@pytest.fixture(autouse=True, scope="module")
def cpu_backend():
    require("cpu")


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(shape)


X = 2, 4, 6, 7
FEATURES = rand(*X), rand(36, 1, 3, 3), rand(36), True
ATTENDED = rand(*X), rand(36, 1, 1, 1), *FEATURES[1:]
GATES = rand(2, 4), rand(2, 9, 6, 7)
WEIGHT, GRAD_Y = rand(8, 4, 3, 3), rand(2, 8, 6, 7)
OPERATORS = {
    "window_moments": (rand(*X),),
    "window_moments_backward": (rand(*X), rand(4, 9, 9), rand(4, 9), None),
    "fold_batch_norm": (*FEATURES[:2], None, None, 1e-5),
    "pool_channels": (*FEATURES, True),
    "pool_channels_backward": (rand(2, 2, 9, 6, 7), *FEATURES, rand(2, 9, 6, 7), [True] * 2),
    "pool_coordinates": FEATURES,
    "pool_coordinates_backward": (rand(2, 4, 3, 6), rand(2, 4, 3, 7), *FEATURES, [True] * 2),
    "rfa_conv": (*ATTENDED, WEIGHT, None),
    "rfa_conv_backward": (GRAD_Y, *ATTENDED, WEIGHT, [True] * 4),
    "gated_conv": (*FEATURES, *GATES, WEIGHT, None),
    "gated_conv_backward": (GRAD_Y, *FEATURES, *GATES, WEIGHT, [True] * 4),
}


def call(name: str, groups: int = 1, **numbers: tuple[int, int]) -> object:
    grouped = (groups,) if "conv" in name else ()
    operator = getattr(torch.ops.rfa_mmdet, name)
    return operator(*OPERATORS[name], *{**GOOD, **numbers}.values(), *grouped)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("argument", GOOD)
def test_out_of_range_arguments_raise(name, argument):
    call(name)
    least = 0 if argument == "padding" else 1
    for value in ABSURD if least == 0 else (0, *ABSURD):
        for pair in ((value, value), (1, value), (value, 1)):
            message = rf"{argument}=\[.*\]: must be at least {least} and at most {LARGEST}"
            with pytest.raises(ValueError, match=message):
                call(name, **{argument: pair})


@pytest.mark.parametrize("name", [name for name in OPERATORS if "conv" in name])
def test_wrong_groups_raise(name):
    for groups in (0, 3, *ABSURD):
        with pytest.raises(ValueError, match=f"groups={groups}: must divide the channels"):
            call(name, groups=groups)


@pytest.mark.parametrize("name", OPERATORS)
def test_too_many_windows_or_positions_raise(name):
    wide = (LARGEST, LARGEST)
    with pytest.raises(ValueError, match="windows; at most"):
        call(name, padding=wide)
    with pytest.raises(ValueError, match="must have at most 32768 positions"):
        call(name, kernel_size=(182, 182), padding=wide)
    with pytest.raises(ValueError, match="is smaller than the window"):
        call(name, dilation=wide)


@pytest.mark.parametrize("stride", [7, 1000, LARGEST])
def test_huge_strides_work_with_one_window(stride):
    y = call("rfa_conv", stride=(stride, stride))
    torch.testing.assert_close(y, call("rfa_conv")[:, :, :1, :1])
    mean, _ = call("window_moments", stride=(stride, stride))
    assert mean.isfinite().all()


def test_weight_without_outputs_raises():
    with pytest.raises(ValueError, match="has no outputs"):
        torch.ops.rfa_mmdet.rfa_conv(*ATTENDED, WEIGHT[:0], None, *GOOD.values(), 1)
