"""Run the operators of one built library over odd shapes; sanitize_kernels.sh starts it."""

import itertools
import sys

import torch

SIZES = [(1, 1), (1, 17), (16, 1), (3, 15), (5, 47), (7, 49), (2, 641), (19, 23)]
WINDOWS = [
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((3, 3), (3, 1), (2, 5), (2, 3)),
    ((3, 3), (5, 4), (1, 1), (1, 1)),
    ((2, 5), (1, 2), (1, 4), (1, 1)),
    ((1, 9), (1, 1), (0, 4), (1, 1)),
]
CHANNELS = [(1, 1, 1), (3, 17, 1), (8, 8, 8), (34, 13, 1), (6, 50, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def main(library: str) -> None:
    """Run every operator over every shape."""
    torch.ops.load_library(library)
    ops = torch.ops.rfa_mmdet_cpu
    runs = 0
    for size, window, (channels, outputs, groups) in itertools.product(SIZES, WINDOWS, CHANNELS):
        kernel, _, padding, dilation = window
        spans = [
            n + 2 * p - d * (k - 1)
            for n, k, p, d in zip(size, kernel, padding, dilation, strict=True)
        ]
        if min(spans) < 1:
            continue
        dtype = DTYPES[runs % len(DTYPES)]
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        K = kernel[0] * kernel[1]
        x = torch.randn(2, channels, *size).to(dtype)
        weight = torch.randn(outputs, channels // groups, K).to(dtype)
        feature = torch.randn(channels, K, K, dtype=compute) if runs % 4 else None
        attention, scale, shift = torch.randn(3, channels, K, dtype=compute)
        bias = torch.randn(outputs).to(dtype) if runs % 2 else None
        parameters = (x, attention, feature, scale, shift, runs % 3 > 0, weight)
        y = ops.forward(*parameters, bias, *window, groups)
        needs = [bool(runs >> i & 1) or not runs % 5 for i in range(4)]
        found = ops.backward(y, *parameters, needs, *window, groups)
        first, second = ops.moments(x, *window)
        grad_x = torch.zeros(x.shape, dtype=compute)
        ops.correct_input_gradient(grad_x, x, second, first, *window)
        found = [y, *found, first, second, grad_x]
        if feature is not None:
            response = (x, feature, shift, runs % 3 > 0)
            pooled, largest = ops.pool_channels(*response, True, *window)
            rows, columns = ops.pool_coordinates(*response, *window)
            both = (True, runs % 5 > 0)
            found += ops.pool_channels_backward(pooled, *response, largest, both, *window)
            found += ops.pool_coordinates_backward(rows, columns, *response, both, *window)
            for gates in ((x.mean((2, 3)), pooled[:, 0]), (rows, columns)):
                y = ops.forward_gated(*response, *gates, weight, bias, *window, groups)
                found += ops.backward_gated(y, *response, *gates, weight, needs, *window, groups)
                found += [y, *gates]
        assert all(t.isfinite().all() for t in found)
        runs += 1
    print(f"{library.rpartition('/')[2]}: {runs} shapes, nothing out of bounds")


if __name__ == "__main__":
    main(sys.argv[1])
