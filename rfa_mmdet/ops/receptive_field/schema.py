"""The backends' four functions as operators of ``torch.ops.rfa_mmdet``, so that compilers see them.

Each takes the name of the backend as its last argument, and has a fake implementation, which tells
shapes only. What they compute stands in ``cpu.py``; the autograd function over them in
``function.py``.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from rfa_mmdet.ops.receptive_field import dispatch

# Statistics are kept where the input has at least so many times their elements.
KEEP_FROM = 12

_WINDOW = "int[2] kernel_size, int[2] stride, int[2] padding, int[2] dilation"
_PARAMETERS = (
    "Tensor x, Tensor attention, Tensor? feature, Tensor scale, Tensor shift, bool relu, "
    "Tensor weight"
)
_library = torch.library.Library("rfa_mmdet", "FRAGMENT")


def _register(schema: str, implementation, fake) -> None:
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rfa_mmdet::{name}", fake, lib=_library)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type that sums, softmax and statistics of ``x`` are computed in.

    Example:
        >>> compute_dtype(torch.ones(1, dtype=torch.bfloat16))
        torch.float32
    """
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def output_size(x: Tensor, kernel_size, stride, padding, dilation) -> tuple[int, int]:
    """Return (h, w), as of a convolution.

    Example:
        >>> output_size(torch.ones(1, 1, 9, 12), (3, 3), (2, 2), (1, 1), (1, 1))
        (5, 6)
    """
    height, width = (
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            x.shape[2:], kernel_size, stride, padding, dilation, strict=True
        )
    )
    return height, width


def are_worth_keeping(statistics: Iterable[Tensor | None], x: Tensor) -> bool:
    """Whether to keep statistics of the windows of a map for the backward pass.

    Of a small map they would be a large share of what is kept, and cost little to compute again.

    Example:
        >>> are_worth_keeping([torch.ones(4, 9)], torch.ones(1, 4, 9, 9))
        False
    """
    return KEEP_FROM * sum(s.numel() for s in statistics) <= x.numel()


def _layout(x: Tensor, backend: str) -> torch.memory_format:
    # The CPU kernels go through channels one by one; the Triton ones take either layout.
    channels_last = backend == "triton" and x.is_contiguous(memory_format=torch.channels_last)
    # Of one channel, either format holds.
    channels_last = channels_last and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format


def _sizes(x: Tensor, kernel_size) -> tuple[int, int]:
    return x.shape[1], kernel_size[0] * kernel_size[1]


# --- moments


def _moments(x, kernel_size, stride, padding, dilation, backend):
    if x.numel() == 0:  # of a rank without data
        return tuple(map(torch.zeros_like, _fake_moments(x, kernel_size, *[None] * 3, backend)))
    module = dispatch.load_backend(backend)
    moments = module.moments(x, kernel_size, stride, padding, dilation)
    return tuple(m.to(compute_dtype(x)) for m in moments)


def _fake_moments(x, kernel_size, stride, padding, dilation, backend):
    channels, K = _sizes(x, kernel_size)
    first = x.new_empty((channels, K), dtype=compute_dtype(x))
    return first, x.new_empty((channels, K, K), dtype=compute_dtype(x))


_register(
    f"rfa_conv_moments(Tensor x, {_WINDOW}, str backend) -> (Tensor, Tensor)",
    _moments,
    _fake_moments,
)

# --- forward


def _forward(x, attention, feature, scale, shift, relu, weight, bias, *geometry_and_backend):
    *geometry, backend = geometry_and_backend
    if x.numel() == 0:
        return _fake_forward(
            x, attention, feature, scale, shift, relu, weight, bias, *geometry_and_backend
        )
    module = dispatch.load_backend(backend)
    y = module.forward(x, attention, feature, scale, shift, relu, weight, bias, *geometry)
    return y.contiguous(memory_format=_layout(x, backend))


def _fake_forward(x, attention, feature, scale, shift, relu, weight, bias, *geometry_and_backend):
    *window, _, backend = geometry_and_backend
    shape = (x.shape[0], weight.shape[0], *output_size(x, *window))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x, backend))


_register(
    f"rfa_conv_forward({_PARAMETERS}, Tensor? bias, {_WINDOW}, int groups, str backend) -> Tensor",
    _forward,
    _fake_forward,
)

# --- backward


def _backward(
    grad_y, x, attention, feature, scale, shift, relu, weight, needs, *geometry_and_backend
):
    *geometry, backend = geometry_and_backend
    fakes = _fake_backward(
        grad_y, x, attention, feature, scale, shift, relu, weight, needs, *geometry_and_backend
    )
    if x.numel() == 0:
        return tuple(map(torch.zeros_like, fakes))
    found = dispatch.load_backend(backend).backward(
        grad_y, x, attention, feature, scale, shift, relu, weight, needs, *geometry
    )
    wanted = (needs[0], needs[1], needs[1], needs[1], needs[2], needs[3])
    # A backend may leave out what is not wanted, and hand it in a type of its own.
    found = [
        value.to(fake.dtype) if want else fake
        for value, fake, want in zip(found, fakes, wanted, strict=True)
    ]
    if needs[0]:
        found[0] = found[0].contiguous(memory_format=_layout(x, backend))
    return tuple(found)


def _fake_backward(
    grad_y, x, attention, feature, scale, shift, relu, weight, needs, *geometry_and_backend
):
    kernel_size, backend = geometry_and_backend[0], geometry_and_backend[-1]
    channels, K = _sizes(x, kernel_size)
    dtype = compute_dtype(x)
    need_x, need_window, need_weight, need_bias = needs

    def empty(wanted, shape, dtype=dtype, layout=torch.contiguous_format):
        shape = shape if wanted else (0,)
        layout = layout if wanted else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout)

    return (
        empty(need_x, x.shape, layout=_layout(x, backend)),
        empty(need_window, (channels, K)),
        empty(need_window, (channels, K)),
        empty(need_window, (channels, K, K)),
        empty(need_weight, weight.shape, x.dtype),
        empty(need_bias, (weight.shape[0],), x.dtype),
    )


_register(
    f"rfa_conv_backward(Tensor grad_y, {_PARAMETERS}, bool[4] needs, {_WINDOW}, int groups, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)

# --- correct_input_gradient


def _correct(grad_x, x, Q, constant, kernel_size, stride, padding, dilation, backend):
    if x.numel():
        module = dispatch.load_backend(backend)
        module.correct_input_gradient(
            grad_x, x, Q, constant, kernel_size, stride, padding, dilation
        )


def _fake_correct(grad_x, x, Q, constant, kernel_size, stride, padding, dilation, backend):
    return None


_register(
    "rfa_conv_correct_input_gradient(Tensor(a!) grad_x, Tensor x, Tensor Q, Tensor constant, "
    f"{_WINDOW}, str backend) -> ()",
    _correct,
    _fake_correct,
)
