"""The argument input_floor, the lowest input for which a warm start is exact."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from tests.helpers.registered import RECEPTIVE


@pytest.mark.parametrize("name", RECEPTIVE)
@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        (dict(input_floor="0"), TypeError, r"^input_floor='0': must be a number$"),
        (dict(input_floor=True), TypeError, r"^input_floor=True: must be a number$"),
        (dict(input_floor=None), TypeError, r"^input_floor=None: must be a number$"),
        (dict(input_floor=0.5), ValueError, r"^input_floor=0\.5: must be finite and at most 0$"),
        (dict(input_floor=float("-inf")), ValueError, r"^input_floor=-inf: must be finite"),
        (dict(input_floor=float("nan")), ValueError, r"^input_floor=nan: must be finite"),
        (
            dict(input_floor=-1, bias=False),
            ValueError,
            r"^input_floor=-1 with bias=False: .*; pass bias=True$",
        ),
        (
            dict(input_floor=-1, norm_cfg=None),
            ValueError,
            r"^input_floor=-1 with norm_cfg=None: .*; pass a norm, or act_cfg=None",
        ),
    ],
)
def test_input_floor_is_checked(name, kwargs, kind, message):
    with pytest.raises(kind, match=message):
        MODELS.get(name)(4, 6, 3, **kwargs)


@pytest.mark.parametrize("name", RECEPTIVE)
def test_valid_input_floors(name):
    layer = MODELS.get(name)
    assert layer(4, 6, 3).input_floor == 0
    assert layer(4, 6, 3, bias=False, input_floor=0).input_floor == 0
    found = layer(4, 6, 3, input_floor=-2)
    assert (found.input_floor, type(found.input_floor)) == (-2.0, float)
    # Without an activation, there is no floor.
    bare = layer(4, 6, 3, input_floor=-2, norm_cfg=None, act_cfg=None).eval()
    plain = nn.Conv2d(4, 6, 3, padding=1)
    bare.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 4, 5, 5) * 9
    torch.testing.assert_close(bare(x), plain(x), rtol=1e-4, atol=1e-4)
