"""Launches and memory of layers, determined with meta tensors."""

from collections.abc import Callable, Sequence
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from benchmarks import modelled
from benchmarks.modelled import Recorder, Step
from benchmarks.sizes import InputSize
from rfa_mmdet.ops.common.windows import Window
from rfa_mmdet.ops.receptive_field.triton import launch as backend
from rfa_mmdet.ops.receptive_field.triton import operators
from tests.helpers.triton_aot import Launch

Functions = dict[str, Callable[[], object]]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def empty_map(shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return empty(*shape, dtype=dtype).contiguous(memory_format=layout)


def of_rfa_conv(x: Tensor, outputs: int, window: Window) -> Functions:
    """Return the operators of RFAConv in inference and training, on meta tensors."""
    c, k = x.shape[1], window.positions
    grad_y = _grad_y(x, outputs, window)
    attention, wide = empty(c * k, 1, 1, 1), empty(c * k)
    feature = empty(c * k, 1, *window.kernel_size)
    weight, bias = _of_product(x, outputs, window)
    parameters = (x, attention, feature, wide, True, weight)
    slope, mean, needs = empty(c, k, k), empty(c, k), (True,) * 4
    return {
        "fold": lambda: operators.fold_moments(mean, slope, feature, wide, wide, 1e-5, 99),
        "of_fold": lambda: operators.fold_moments_backward(
            feature, wide, feature, wide, mean, slope, wide, wide, 99
        ),
        "forward": lambda: operators.rfa_conv(*parameters, bias, *window, 1),
        "moments": lambda: operators.window_moments(x, *window),
        "backward": lambda: operators.rfa_conv_backward(grad_y, *parameters, needs, *window, 1),
        "correct": lambda: operators.window_moments_backward(x, slope, mean, x, *window),
    }


def of_gated(x: Tensor, outputs: int, window: Window) -> Functions:
    """Return the operators on gated and pooled features."""
    (b, c), k, size = x.shape[:2], window.positions, window.output_size(x.shape[2:])
    (high, wide), (height, width) = window.kernel_size, size
    grad_y = _grad_y(x, outputs, window)
    features = x, empty(c * k, 1, high, wide), empty(c * k), True
    weight, bias = _of_product(x, outputs, window)
    gates = {
        "channels": (empty(b, c), empty(b, k, *size)),
        "rows": (empty(b, c, high, height), empty(b, c, wide, width)),
    }
    pooled, largest = empty(b, 2, k, *size), empty(b, k, *size)
    both, needs = (True, True), (True,) * 4

    def gated(of: str) -> Functions:
        taken = *features, *gates[of], weight
        return {
            of: lambda: operators.gated_conv(*taken, bias, *window, 1),
            f"{of}, backward": lambda: operators.gated_conv_backward(
                grad_y, *taken, needs, *window, 1
            ),
        }

    return {
        **gated("channels"),
        **gated("rows"),
        "pool": lambda: operators.pool_channels(*features, True, *window),
        "pool, backward": lambda: operators.pool_channels_backward(
            pooled, *features, largest, both, *window
        ),
        "means": lambda: operators.pool_coordinates(*features, *window),
        "means, backward": lambda: operators.pool_coordinates_backward(
            *gates["rows"], *features, both, *window
        ),
    }


def _grad_y(x: Tensor, outputs: int, window: Window) -> Tensor:
    size = window.output_size(x.shape[2:])
    return empty_map((len(x), outputs, *size), x.dtype, not x.is_contiguous())


def _of_product(x: Tensor, outputs: int, window: Window) -> tuple[Tensor, Tensor]:
    shape = outputs, x.shape[1], *window.kernel_size
    return empty(*shape, dtype=x.dtype), empty(outputs, dtype=x.dtype)


class Launches(Recorder):
    """Records launches without compiling them."""

    def __init__(self, outside):
        super().__init__(outside)
        self.kernels: list[Launch] = []

    def launch(self, kernel, grid, x, arguments, constants):
        self.kernels.append(Launch(kernel, tuple(grid), tuple(arguments), constants))
        self.steps.append(Step(kernel.fn.__name__, 0, 0))


def launches(size: InputSize, dtype: torch.dtype, layout: str, training: bool) -> Launches:
    """Record RFAConv on an H100: inference, or a training step with batch statistics."""
    made: list[Launches] = []

    def make(outside):
        made.append(Launches(outside))
        return made[-1]

    with mock.patch.object(modelled, "Recorder", make):
        modelled.layer(size, dtype, layout, training)
    return made[0]


class Memory(TorchDispatchMode):
    """Counts the bytes of new tensors on any device; launches do nothing.

    Attributes:
        most (int): Peak bytes of tensors created since ``start``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.start()

    def start(self) -> None:
        """Restart counting."""
        self.most, self.old = 0, {**self.alive}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "rfa_mmdet":
            args = [tuple(a) if isinstance(a, list) else a for a in args]
            operator = getattr(operators, func._schema.name.partition("::")[2])
            with self, mock.patch.object(backend, "launch", self.keep_nothing):
                return operator(*args, **kwargs)
        self.old |= self._new(args, kwargs)  # inputs seen for the first time
        result = func(*args, **kwargs)
        self._new(result)
        found = self.alive.items()
        self.alive = {key: made for key, made in found if not made[0].expired()}
        self.most = max(
            self.most, sum(n for key, (_, n) in self.alive.items() if key not in self.old)
        )
        return result

    @staticmethod
    def keep_nothing(*_) -> None:
        """Replace a launch; a mock would keep its tensors alive."""

    def _new(self, *of):
        tensors = [t for t in tree_flatten(of)[0] if isinstance(t, torch.Tensor)]
        found = {}
        for storage in (t.untyped_storage() for t in tensors):
            reference = StorageWeakRef(storage)
            if reference.cdata not in self.alive:
                found[reference.cdata] = reference, storage.nbytes()
        self.alive |= found
        return found
