"""TF32 of matrix products in torch's old and new settings, and marks for the compiler."""

import itertools
import os
import traceback

import pytest
import torch
from torch import backends

from rfa_mmdet.ops.common.torch_versions import (
    constant_in_graphs,
    convolves_in_tf32,
    products_as_convolutions,
)

NEW = hasattr(backends, "fp32_precision")
needs_new = pytest.mark.skipif(not NEW, reason="this torch has no inherited settings")
CHOICES = {
    "backends.cuda.matmul.allow_tf32": (True, False),
    "backends.cudnn.allow_tf32": (True, False),
    "torch.set_float32_matmul_precision": ("high", "medium"),
}
if NEW:
    CHOICES |= {
        "backends.fp32_precision": ("ieee", "tf32", "none"),
        "backends.cudnn.fp32_precision": ("ieee", "tf32", "none"),
        "backends.cuda.matmul.fp32_precision": ("ieee", "tf32", "none"),
        "backends.cudnn.conv.fp32_precision": ("ieee", "tf32", "none"),
    }


def choose(name: str, value: object) -> None:
    function = name.startswith("torch.set")
    exec(f"{name}({value!r})" if function else f"{name} = {value!r}")


def settings() -> dict[str, object]:
    found = {}
    for name in CHOICES:
        asked = name.replace(".set_", ".get_") + "()" if ".set_" in name else name
        try:
            found[name] = eval(asked)
        except RuntimeError:  # settings contradict each other
            found[name] = "raises"
    return found


def multiplies_in_tf32() -> bool:
    if NEW:  # what ATen reads
        return backends.cuda.matmul.fp32_precision == "tf32"
    return backends.cuda.matmul.allow_tf32


def in_a_fork(function) -> bool:
    """Run in a fork, because settings cannot be reset: torch hides which ones are inherited."""
    child = os.fork()
    if not child:
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def check(chosen) -> None:
    for setting in chosen:
        choose(*setting)
    before, tf32 = settings(), convolves_in_tf32()
    for dtype in (torch.float16, torch.float64):
        with products_as_convolutions(dtype):
            assert settings() == before, chosen
    with products_as_convolutions(torch.float32):
        assert multiplies_in_tf32() == convolves_in_tf32() == tf32, chosen
    assert settings() == before, chosen
    with pytest.raises(KeyError), products_as_convolutions(torch.float32):
        raise KeyError
    assert settings() == before, chosen


def check_all() -> None:
    """Check combinations in sequence, each on top of the state that the previous ones left."""
    each = [[None, *((name, value) for value in values)] for name, values in CHOICES.items()]
    seen = set()
    for choice in itertools.product(*each):
        chosen = [setting for setting in choice if setting]
        if len(chosen) <= 3:
            check(chosen)
            seen.add(str(settings()))
    assert len(seen) > (20 if NEW else 5)


def test_products_follow_convolutions_and_every_setting_is_restored():
    assert in_a_fork(check_all)


def check_switch() -> None:
    assert convolves_in_tf32()
    assert not multiplies_in_tf32()
    with products_as_convolutions(torch.float32):
        assert multiplies_in_tf32()
    backends.cudnn.allow_tf32 = False
    backends.cuda.matmul.allow_tf32 = True
    with products_as_convolutions(torch.float32):
        assert not multiplies_in_tf32()


def test_cudnn_setting_is_followed():
    assert in_a_fork(check_switch)


def check_inheritance() -> None:
    backends.fp32_precision, backends.cudnn.conv.fp32_precision = "tf32", "ieee"
    with products_as_convolutions(torch.float32):
        assert not multiplies_in_tf32()
    assert multiplies_in_tf32()
    backends.fp32_precision = "ieee"
    assert not multiplies_in_tf32()


@needs_new
def test_inherited_settings_stay_inherited():
    assert in_a_fork(check_inheritance)


def test_marks_for_the_compiler_are_those_of_torch():
    def ours():
        return 1

    def theirs():
        return 1

    torch.compiler.assume_constant_result(theirs)
    assert vars(constant_in_graphs(ours)) == vars(theirs) != {}
