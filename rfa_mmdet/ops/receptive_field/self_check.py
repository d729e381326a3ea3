"""Check at run time that the GPU kernels match the formulas, before a layer relies on them.

Triton compiles the kernels on the user's machine, maybe for a GPU or with a version never tested.
"""

import inspect
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rfa_mmdet.ops.common.precision import compute_dtype, no_autocast
from rfa_mmdet.ops.common.tolerances import TOLERANCES
from rfa_mmdet.ops.common.torch_versions import convolves_in_tf32
from rfa_mmdet.ops.common.windows import Window, convolve_windows
from rfa_mmdet.ops.receptive_field import plain, statistics
from rfa_mmdet.ops.receptive_field.functional import WindowFeatures, fold_batch_norm
from rfa_mmdet.ops.receptive_field.reference import receptive_field_attention, receptive_field_mean

BATCH, CHANNELS, GROUPS, SIZE, EPS = 2, 32, 1, (7, 5), 1e-5
WINDOW = Window((3, 3), padding=(1, 1))
K = WINDOW.positions
# Factor on the tolerance of the tests: this must catch wrong results, not rounding of some GPU.
LEEWAY = 4
PATIENCE = 300  # seconds; below the timeout of collectives, in which other ranks may be waiting


class Case(NamedTuple):
    """A combination that kernels are compiled for.

    Attributes:
        device (torch.device): The device, with its index.
        dtype (torch.dtype): Dtype that the layer computes in.
        channels_last (bool): Whether the input is channels_last.
        gradients (bool): Whether there will be a backward pass.
        operators (tuple[str, ...]): Operators that the layer calls.
    """

    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    gradients: bool
    operators: tuple[str, ...]


PASSED: set[Case] = set()
# Device and dtype for which the operators fall back to plain torch -> the reason.
FAILED: dict[tuple[torch.device, torch.dtype], Exception] = {}


def is_known(case: Case) -> bool:
    """Return whether a case has been checked.

    Example:
        >>> is_known(Case(torch.device("cuda", 0), torch.float32, False, True, ()))
        False
    """
    return case in PASSED or (case.device, case.dtype) in FAILED


def failure(case: Case) -> Exception | None:
    """Check a case once per process.

    After a failure, all operators run in plain torch for this device and dtype.

    Args:
        case (Case): A case whose kernels are registered.

    Returns:
        Exception | None: What the kernels raised, or an ``ArithmeticError`` that says how far they
        are from the formula, for this or an earlier case with the same device and dtype. None if
        all passed.

    Example:
        >>> failure(Case(torch.device("cpu"), torch.float64, False, True, ()))
    """
    if not is_known(case):
        if case.device.type == "cuda" and os.environ.get("LOCAL_RANK", "0") == "0":
            _announce()
        with one_process_at_a_time(triton_cache() / _lock_name(case)):
            error = _failure(case)
        if error is None:
            PASSED.add(case)
        else:
            FAILED[case.device, case.dtype] = error
    return FAILED.get((case.device, case.dtype))


def _lock_name(case: Case) -> str:
    # Processes that compile kernels for other layers or inputs need not wait.
    dtype = str(case.dtype).removeprefix("torch.")
    layout = "channels_last" if case.channels_last else "NCHW"
    return "-".join(("rfa_mmdet", dtype, layout, *case.operators)) + ".lock"


def _failure(case: Case) -> Exception | None:
    try:
        compare(case)
    except Exception as error:  # a compiler may raise anything
        traceback.clear_frames(error.__traceback__)  # frames hold tensors
        return error
    return None


def or_plain(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a kernel so that it falls back to plain torch for what is in :data:`FAILED`.

    Args:
        kernel (Callable): A kernel named after its operator.

    Returns:
        Callable: The kernel to register.
    """
    names = [*inspect.signature(kernel).parameters]
    takes_map = "x" in names  # otherwise statistics, which are float32 for any map
    place = names.index("x" if takes_map else "mean")
    instead = getattr(plain if takes_map else statistics, kernel.__name__)

    @wraps(kernel)
    def run(*args: Any) -> Any:
        x = args[place]
        if takes_map:
            failed = (x.device, x.dtype) in FAILED
        else:
            failed = any(device == x.device for device, _ in FAILED)
        return (instead if failed else kernel)(*args)

    return run


def triton_cache() -> Path:
    """Return Triton's cache folder.

    Example:
        >>> triton_cache().name
        'cache'
    """
    home = os.environ.get("TRITON_HOME", "~")
    return Path(os.environ.get("TRITON_CACHE_DIR") or f"{home}/.triton/cache").expanduser()


@cache
def _announce() -> None:
    print(
        "rfa_mmdet: compiling and checking the GPU kernels of the receptive-field convolutions; "
        f"the compiled kernels are cached in {triton_cache()}",
        file=sys.stderr,
        flush=True,
    )


@contextmanager
def one_process_at_a_time(path: Path) -> Iterator[None]:
    """Let only one of the processes with the same lock compile at a time.

    Triton would compile the same kernels in each; so the others find them in its cache. Processes
    with other locks may compile a few common kernels at the same time, which only costs time. The
    system releases the lock if its holder dies. After waiting for :data:`PATIENCE`, or without
    file locks, a process continues without the lock, which only costs time.

    Args:
        path (Path): A file that the processes share; created with its folder if missing.

    Example:
        >>> from tempfile import mkdtemp
        >>> with one_process_at_a_time(Path(mkdtemp(), "lock")):
        ...     pass
    """
    try:
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except (ImportError, OSError):  # Windows; read-only folder
        yield
        return
    with file:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # file system without locks
                break
        yield  # closing the file unlocks it


def compare(case: Case) -> None:
    """Compare the operators with the formula on a small input.

    Independent of the caller's state, and leaves it unchanged: autocast, inference mode, hooks on
    saved tensors, random number generators.

    Args:
        case (Case): A case on any device that the operators support.

    Raises:
        ArithmeticError: If they differ.
    """
    with (
        torch.inference_mode(False),
        torch.set_grad_enabled(case.gradients),
        torch.autograd.graph.saved_tensors_hooks(_same, _same),
        no_autocast(torch.empty(0, device=case.device)),
    ):
        given = _inputs(case)
        expected = _compute(case, {k: t.cpu().double() for k, t in given.items()}, _Formula.of)
        found = _compute(case, given, _window_features)
    dtype = case.dtype
    if dtype == torch.float32 and case.device.type == "cuda" and convolves_in_tf32():
        dtype = torch.float16  # as precise as TF32
    for name, exact in expected.items():
        is_gradient = name.startswith("the gradient")
        allowed = TOLERANCES[dtype]
        limit = LEEWAY * (allowed.layer_gradient if is_gradient else allowed.output)
        difference = (found[name].cpu().double() - exact).abs().max() / exact.abs().max()
        if not difference <= limit:  # or NaN
            raise ArithmeticError(
                f"{name} differs from the formula by {float(difference):.1e} of its largest "
                f"value (tolerance: {limit:.1e})"
            )


def _same(x: Tensor) -> Tensor:
    return x


def _spread(shape: tuple[int, ...], start: int) -> Tensor:
    """Return deterministic, evenly spread numbers between -0.5 and 0.5."""
    n = torch.arange(start, start + torch.Size(shape).numel(), dtype=torch.float64, device="cpu")
    return (n.square() * 0.6180339887498949).remainder(1).sub(0.5).view(shape)


def _inputs(case: Case) -> dict[str, Tensor]:
    wide, (height, width) = CHANNELS * K, SIZE
    kh, kw = WINDOW.kernel_size
    shapes: dict[str, tuple[int, ...]] = dict(
        x=(BATCH, CHANNELS, height, width),
        feature=(wide, 1, kh, kw),
        scale=(wide,),
        offset=(wide,),
        weight=(CHANNELS, CHANNELS // GROUPS, kh, kw),
        bias=(CHANNELS,),
    )
    if "rfa_conv" in case.operators:
        shapes["attention"] = (wide, 1, 1, 1)
    if "pool_channels" in case.operators:
        shapes["first"], shapes["second"] = (BATCH, CHANNELS), (BATCH, K, height, width)
    if "pool_coordinates" in case.operators:
        shapes["first"] = (BATCH, CHANNELS, kh, height)
        shapes["second"] = (BATCH, CHANNELS, kw, width)
    given = {}
    for i, (name, shape) in enumerate(shapes.items()):
        # Parameters of the features stay in float32, as in the layers. No mean is 0.
        dtype = case.dtype if name in ("x", "weight", "bias") else compute_dtype(case.dtype)
        value = _spread(shape, 1000 * i).add(0.2).to(case.device, dtype)
        if name == "x" and case.channels_last:
            value = value.contiguous(memory_format=torch.channels_last)
        given[name] = value.requires_grad_(case.gradients)
    return given


def _compute(
    case: Case, given: dict[str, Tensor], make: Callable[..., tuple[Any, Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Return all outputs, and the gradients of all inputs."""
    features, mean, variance = make(**{k: given[k] for k in ("x", "feature", "scale", "offset")})
    found = {"the mean": mean, "the variance": variance}
    outputs: dict[str, Tensor] = {}
    conv = given["weight"], given["bias"], GROUPS
    if "rfa_conv" in case.operators:
        outputs["rfa_conv"] = features.attend(given["attention"], *conv)
    if "pool_channels" in case.operators:
        outputs["pool_channels"] = features.max_and_mean()
    if "pool_coordinates" in case.operators:
        outputs["rows"], outputs["columns"] = features.coordinate_means()
    if "gated_conv" in case.operators:
        outputs["gated_conv"] = features.convolve((given["first"], given["second"]), *conv)
    if case.gradients and outputs:
        upstream = [
            torch.empty_like(y).copy_(_spread(tuple(y.shape), 500 * i))
            for i, y in enumerate(outputs.values())
        ]
        gradients = torch.autograd.grad([*outputs.values()], [*given.values()], upstream)
        found.update(zip((f"the gradient of {name}" for name in given), gradients, strict=True))
    return {name: y.detach() for name, y in {**found, **outputs}.items()}


def _window_features(
    x: Tensor, feature: Tensor, scale: Tensor, offset: Tensor
) -> tuple[WindowFeatures, Tensor, Tensor]:
    x, feature, shift, mean, var = fold_batch_norm(x, feature, scale, offset, EPS, WINDOW)
    return WindowFeatures(x, feature, shift, True, WINDOW), mean, var


class _Formula(NamedTuple):
    """Computes the same as :class:`WindowFeatures` from materialised features (B, C, K, h, w)."""

    x: Tensor
    features: Tensor

    @classmethod
    def of(
        cls, x: Tensor, feature: Tensor, scale: Tensor, offset: Tensor
    ) -> tuple["_Formula", Tensor, Tensor]:
        responses = F.conv2d(x, feature, None, *WINDOW[1:], groups=CHANNELS)
        var, mean = torch.var_mean(responses.detach(), (0, 2, 3))
        normed = F.batch_norm(responses, None, None, scale, offset, True, 0.0, EPS)
        return cls(x, normed.relu().unflatten(1, (CHANNELS, K))), mean, var

    def attend(self, attention: Tensor, *conv: Any) -> Tensor:
        mean = receptive_field_mean(self.x, *WINDOW)
        return convolve_windows(self.features * receptive_field_attention(mean, attention), *conv)

    def max_and_mean(self) -> Tensor:
        return torch.stack([self.features.amax(1), self.features.mean(1)], 1)

    def coordinate_means(self) -> tuple[Tensor, Tensor]:
        windows = self.features.unflatten(2, WINDOW.kernel_size)  # (B, C, kh, kw, h, w)
        return windows.mean((3, 5)), windows.mean((2, 4))

    def convolve(self, gates: tuple[Tensor, Tensor], *conv: Any) -> Tensor:
        first, second = gates
        if first.dim() == 2:  # channel and position gates
            weighted = self.features * first[:, :, None, None, None] * second[:, None]
        else:
            windows = self.features.unflatten(2, WINDOW.kernel_size)
            weighted = windows * first[:, :, :, None, :, None] * second[:, :, None, :, None]
            weighted = weighted.flatten(2, 3)
        return convolve_windows(weighted, *conv)
