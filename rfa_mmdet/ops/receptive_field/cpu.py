"""The CPU backend: C++ in ``csrc/``, built by ``pip install`` where a C++ compiler and torch are.

One build for each set of vector instructions; the one that torch itself uses here is loaded. The
functions take the tensors of ``function.py`` on the CPU in float32, float64 or bfloat16, and
compute in float32 or float64. Shapes: ``x`` is (B, C, H, W), not empty; K = kh * kw; (h, w) is the
size of the output. ``kernel_size``, ``stride``, ``padding`` and ``dilation`` are pairs.

``moments(x, kernel_size, stride, padding, dilation)``
    Over the B * h * w windows of each channel, zeros of the padding counted: the mean of each
    position, (C, K), and the covariance of the positions, (C, K, K).
``forward(x, attention, feature, scale, shift, relu, weight, bias, kernel_size, stride, padding,
dilation, groups)``
    With ``attention``, ``scale`` and ``shift`` (C, K), ``feature`` (C, K, K) or None for the values
    of the window themselves, ``weight`` (O, C / groups, K), ``bias`` (O) or None: the output
    (B, O, h, w) of act(scale * (feature @ window) + shift) * softmax(attention * mean of window).
``backward(grad_y, x, attention, feature, scale, shift, relu, weight, needs, kernel_size, stride,
padding, dilation, groups)``
    Gradients as if scale and shift were parameters: of x, attention, shift, then the products
    (C, K, K) sum over positions of (gradient of response i) * (value j of the window), from which
    those of feature and scale follow; of weight and bias. ``needs``: whether x, the four of the
    window, weight and bias are wanted; what is not is an empty tensor. That of x is in the type
    computed in.
``correct_input_gradient(grad_x, x, Q, constant, kernel_size, stride, padding, dilation)``
    Subtracts fold(constant + Q @ window) from ``grad_x``, in place; Q (C, K, K) is symmetric.

Six more, of RFCBAMConv and RFCAConv, have no function here: ``rfa_mmdet/ops/lazy_windows.py``
calls the operators. Of features act(feature @ window + shift), results in the type computed in:

``pool_channels(x, feature, shift, relu, indexed, kernel_size, stride, padding, dilation)``
    Their maximum and mean over the channels, (B, 2, K, h, w); and, if ``indexed``, the first
    channel that has the maximum, (B, K, h, w).
``pool_coordinates(x, feature, shift, relu, kernel_size, stride, padding, dilation)``
    Their means over the rows of the windows laid side by side, (B, C, kh, h), and the columns,
    (B, C, kw, w).
``pool_channels_backward(grad, x, feature, shift, relu, largest, needs, ...)``,
``pool_coordinates_backward(grad_rows, grad_columns, x, feature, shift, relu, needs, ...)``
    Gradients of x, shift and, as above, the products, from which that of feature follows.
    ``needs``: whether that of x, and those of the other two, are wanted.
``forward_gated(x, feature, shift, relu, first, second, weight, bias, kernel_size, stride, padding,
dilation, groups)``
    The convolution of the features times two gates: of channels (B, C) and positions (B, K, h, w),
    or of rows (B, C, kh, h) and columns (B, C, kw, w).
``backward_gated(grad_y, x, feature, shift, relu, first, second, weight, needs, ..., groups)``
    Gradients of x, shift, products, both gates, weight and bias; ``needs`` as of ``backward``.

No thread adds to what another one writes: results do not depend on the number of threads.
"""

from pathlib import Path

import torch

OPERATORS = (
    *("moments", "forward", "backward", "correct_input_gradient"),
    *("pool_channels", "pool_channels_backward", "pool_coordinates", "pool_coordinates_backward"),
    *("forward_gated", "backward_gated"),
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def load() -> str | None:
    """Load the built library.

    Returns:
        str | None: Why it cannot be used here. None: it is loaded.

    Example:
        >>> reason = load()
        >>> reason is None or isinstance(reason, str)
        True
    """
    if hasattr(torch.ops.rfa_mmdet_cpu, "forward"):
        return _other_sources()
    capability = torch.backends.cpu.get_cpu_capability().lower()
    folder = Path(__file__).parent
    for name in dict.fromkeys((capability, "default")):
        for file in sorted(folder.glob(f"_cpu_{name}.*so")):
            try:
                torch.ops.load_library(file)
            except OSError as error:
                return f"{file.name} does not load, as it was built for another torch: {error}"
            return _other_sources()
    return "the C++ extension is not built"


def _other_sources() -> str | None:
    if all(hasattr(torch.ops.rfa_mmdet_cpu, name) for name in OPERATORS):
        return None
    return "the C++ extension was built from older sources than these"


def moments(*args):
    """See the module's docstring."""
    return torch.ops.rfa_mmdet_cpu.moments(*args)


def forward(*args):
    """See the module's docstring."""
    return torch.ops.rfa_mmdet_cpu.forward(*args)


def backward(*args):
    """See the module's docstring."""
    return torch.ops.rfa_mmdet_cpu.backward(*args)


def correct_input_gradient(*args):
    """See the module's docstring."""
    return torch.ops.rfa_mmdet_cpu.correct_input_gradient(*args)
