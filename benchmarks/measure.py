"""Time, peak memory and bytes kept for the backward pass of a callable."""

import os
import time
from collections.abc import Callable, Iterable
from statistics import median, quantiles

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

# Kineto writes two lines to stderr whenever the profiler starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

LARGER_THAN_L2 = 256 * 2**20  # bytes


def saved_bytes(run: Callable[[], Tensor], module: nn.Module) -> int:
    """Count the bytes that autograd saves for the backward pass, each storage once.

    Args:
        run (Callable): Computes an output that requires grad.
        module (nn.Module): Its parameters and buffers do not count, because they exist anyway.

    Returns:
        int: Bytes of the storages, including the input's if it is saved.

    Example:
        >>> x, identity = torch.rand(4, 5, requires_grad=True), nn.Identity()
        >>> saved_bytes(lambda: x.sin() + 1, identity)  # x, to compute its cosine
        80
    """
    known = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()  # kept alive, so that no address is reused
    del output
    return sum(storages.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Measure the peak memory of a run, beyond what was allocated before.

    Counts what torch's allocator reports on CUDA, and what torch's profiler sees on a CPU. Neither
    includes workspace that libraries allocate themselves.

    Args:
        run (Callable): What to run.
        device (torch.device): Device that it runs on.

    Returns:
        int: Bytes.

    Example:
        >>> x = torch.rand(1000)
        >>> peak_bytes(lambda: x.sin().exp(), torch.device("cpu"))
        8000
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    # start_us before torch 2.4
    for event in sorted(events, key=lambda e: (getattr(e, "start_ns", None) or e.start_us)()):
        held += event.nbytes()
        most = max(most, held)
    return most


def interleaved(
    runs: dict[str, Callable[[], object]],
    seconds: float,
    min_rounds: int,
    device: torch.device,
    max_rounds: int = 200,
) -> dict[str, list[float]]:
    """Time several callables in alternation, so that all see the same machine load.

    Each round runs every callable once, after an untimed warm-up.

    Args:
        runs (dict[str, Callable]): What to time, by name.
        seconds (float): Time to spend.
        min_rounds (int): Minimum number of rounds, even if they take longer.
        device (torch.device): Device that they run on; on CUDA, timed with events.
        max_rounds (int): Maximum number of rounds. Defaults to 200.

    Returns:
        dict[str, list[float]]: Seconds of each round, by name.
    """
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    names, start = list(runs), time.perf_counter()
    for rounds in range(max_rounds):
        if rounds >= min_rounds and time.perf_counter() - start >= seconds:
            break
        for name in names:
            times[name].append(_seconds(runs[name], device))
        names = names[1:] + names[:1]  # rotate the order
    return times


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time a run."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Flushes the L2 cache, as the other layers of a network would, and lets the CPU run ahead.
        torch.empty(LARGER_THAN_L2, dtype=torch.uint8, device=device).zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1000


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return median and quartiles.

    Example:
        >>> spread([1.0, 2.0, 3.0])
        {'median': 2.0, 'q25': 1.5, 'q75': 2.5}
    """
    values = list(values)
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median(values), "q25": low, "q75": high}


def ratio(times: list[float], baseline: list[float]) -> dict[str, float]:
    """Return median and quartiles of the ratios of two callables' times, round by round.

    A temporary slowdown affects both times of a round, so hardly changes their ratio.

    Example:
        >>> ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
        {'median': 2.0, 'q25': 2.0, 'q75': 2.0}
    """
    return spread(a / b for a, b in zip(times, baseline, strict=True))
