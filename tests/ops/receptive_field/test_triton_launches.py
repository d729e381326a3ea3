"""Number of launches and memory of layers on a GPU, determined with meta tensors."""

import importlib.util
import os
from collections import Counter, defaultdict
from math import ceil
from random import Random

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from benchmarks.modelled import nbytes
from benchmarks.sizes import SIZES, InputSize
from rfa_mmdet.ops.common.windows import Window
from rfa_mmdet.ops.receptive_field.triton.chunks import CHUNK_BYTES
from tests.helpers.triton_cases import KINDS, train
from tests.helpers.triton_steps import Memory, empty, empty_map, launches

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") != "0",
    reason="Triton's interpreter needs tensors with memory",
)
LAYOUTS = ("NCHW", "channels_last")
DTYPES = (torch.bfloat16, torch.float32)
# Launches of RFAConv, by torch's operators and by our kernels, with a single chunk.
INFERENCE, STEP = 4, 20
# Launches per additional chunk, forward and backward.
FORWARD, BACKWARD = 2, 6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_launches_of_a_layer(layout, dtype):
    for size in SIZES["gpu"] + SIZES["small"]:
        made = Counter(step.name for step in launches(size, dtype, layout, False).steps)
        chunks = made["features_kernel"]
        assert chunks >= 1
        assert made.total() <= INFERENCE + FORWARD * (chunks - 1), (size, made)
        made = Counter(step.name for step in launches(size, dtype, layout, True).steps)
        chunks, back = made["features_kernel"], made["gradient_kernel"]
        assert min(chunks, back) >= 1
        most = STEP + FORWARD * (chunks - 1) + BACKWARD * (back - 1)
        assert made.total() <= most, (size, made)


# Buffers of a chunk, and bytes for the parts of the parameters' gradients.
BUFFERS = {"attention": 2 + 1 / 9, "channels": 3, "rows": 3}
PARTS = 2**24


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_a_backward_pass(layout, kind, dtype):
    """Memory besides the gradients; the gradient through the moments is added in place.

    Gates also need a pool's gradient of the map, and the pooled values of each position.
    """
    for size in SIZES["gpu"]:
        c, window = size.channels, Window((3, 3), (size.stride,) * 2, (1, 1))
        shape = size.batch, c, size.height, size.width
        inputs = dict(
            x=empty_map(shape, dtype, layout == "channels_last"),
            feature=empty(9 * c, 1, 3, 3),
            scale=empty(9 * c),
            offset=empty(9 * c),
            weight=empty_map((c, c, 3, 3), dtype, layout == "channels_last"),
            bias=empty(c, dtype=dtype),
        )
        if kind == "attention":
            inputs["attention"] = empty(9 * c, 1, 1, 1)
        for tensor in inputs.values():
            tensor.requires_grad_()
        with Memory() as memory:
            y, *_ = train(kind, inputs, window)
            grad_y = torch.empty_like(y)
            memory.start()
            gradients = torch.autograd.grad(y, list(inputs.values()), grad_y)
        features = min(CHUNK_BYTES, 9 * c * window.count(inputs["x"]) * dtype.itemsize)
        allowed, of_map = BUFFERS[kind] * features + PARTS, nbytes(inputs["x"])
        if kind == "channels":
            allowed += 3 * 4 * 9 * window.count(inputs["x"])
        if kind != "attention":
            # A dispatch mode makes autograd add gradients out of place, after buffers are freed.
            allowed = max(of_map + allowed, 2 * of_map + 2**20)
        beside = memory.most - sum(map(nbytes, gradients))
        assert 0 < beside <= allowed, size


def test_freed_memory_does_not_count():
    x = empty(10)
    with Memory() as memory:
        y = x * 2
        memory.start()
        kept = [y.sin() for _ in range(3)]  # 40 bytes each
        for _ in range(5):
            kept.append(kept[0].exp() + 1)
        del kept
        x.view(5, 2).cos()
    assert memory.most == 9 * 40


def images(count):
    """Yield sizes of images as in multi-scale training, up to 1333 x 1333."""
    random = Random(0)
    for _ in range(count):
        short, ratio = random.randint(320, 800), random.uniform(1, 2.5)
        size = short, min(1333, round(short * ratio))
        yield size if random.random() < 0.5 else size[::-1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_image_sizes_do_not_cause_recompilation(layout):
    keys = defaultdict(set)
    for number, (high, wide) in enumerate(images(200)):
        stage = number % 4
        down = 4 * 2**stage
        size = InputSize(2, 64 * 2**stage, ceil(high / down), ceil(wide / down))
        for launch in launches(size, torch.bfloat16, layout, True).kernels:
            keys[launch.name].add(launch.key())
    # Twice: with the norm's bias, and without it when the backward pass recomputes statistics.
    allowed = defaultdict(lambda: 1, fold_moments_kernel=2)
    assert {name: len(found) for name, found in keys.items() if len(found) > allowed[name]} == {}
