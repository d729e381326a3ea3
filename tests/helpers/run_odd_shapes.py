"""Train the convolutions with the C++ kernels of one library on odd shapes.

A script, which test_sanitized_kernels.py starts in processes that look for reads and writes out of
bounds. By the layers, so that it says what operators there are in no way.
"""

import itertools
import sys
from pathlib import Path

import torch
from torch import nn

from rfa_mmdet.layers import RFAConv, RFCAConv, RFCBAMConv

SIZES = [(1, 1), (1, 17), (16, 1), (3, 15), (5, 47), (7, 49), (2, 641), (19, 23)]
WINDOWS = [  # kernel, stride, padding, dilation
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((3, 3), (3, 1), (2, 5), (2, 3)),
    ((3, 3), (5, 4), (1, 1), (1, 1)),
    ((2, 5), (1, 2), (1, 4), (1, 1)),
    ((1, 9), (1, 1), (0, 4), (1, 1)),
]
CHANNELS = [(1, 1, 1), (3, 17, 1), (8, 8, 8), (34, 13, 1), (6, 50, 2)]  # in, out, groups
DTYPES = [torch.float32, torch.bfloat16]
LAYERS = [
    lambda *args, **kwargs: RFAConv(*args, **kwargs, backend="cpu"),
    lambda *args, **kwargs: RFAConv(*args, **kwargs, backend="cpu", feature="unfold"),
    RFCBAMConv,
    RFCAConv,
]


def frozen(layer: nn.Module, number: int) -> None:
    """Let each part go without a gradient in some of the runs."""
    for i, parameter in enumerate(layer.parameters()):
        parameter.requires_grad_(number % (i + 2) > 0)


def main(library: str) -> None:
    """Train each layer on every shape, and check that the library has done it."""
    torch.manual_seed(0)
    runs = 0
    for size, window in itertools.product(SIZES, WINDOWS):
        kernel, stride, padding, dilation = window
        spans = zip(size, kernel, padding, dilation, strict=True)
        if min(n + 2 * p - d * (k - 1) for n, k, p, d in spans) < 1:
            continue
        for build in LAYERS:
            channels, outputs, groups = CHANNELS[runs % len(CHANNELS)]
            dtype = DTYPES[runs % len(DTYPES)]
            layer = build(
                *(channels, outputs, kernel),
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=groups,
                bias=runs % 4 < 2,
                act_cfg=dict(type="ReLU") if runs % 3 else None,
            )
            frozen(layer, runs)
            layer.train(runs % 7 > 0)
            x = torch.randn(2, channels, *size, dtype=dtype, requires_grad=runs % 5 > 0)
            # oneDNN multiplies bfloat16, where it can.
            with torch.backends.mkldnn.flags(enabled=runs % 4 != 3):
                y = layer.to(dtype)(x)
                if y.requires_grad:
                    y.backward(torch.randn_like(y))
            gradients = [p.grad for p in (x, *layer.parameters()) if p.grad is not None]
            assert all(t.isfinite().all() for t in (y, *gradients))
            runs += 1
    assert library in Path("/proc/self/maps").read_text()
    print(f"{runs} runs, nothing out of bounds")


if __name__ == "__main__":
    main(sys.argv[1])
