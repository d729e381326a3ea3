"""Time, peak memory and bytes kept for the backward pass of a callable."""

import os
import time
from collections.abc import Callable, Iterable
from statistics import median, quantiles

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

# The profiler's library writes two lines to stderr whenever it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

LARGER_THAN_L2 = 256 * 2**20  # bytes


def saved_bytes(run: Callable[[], Tensor], module: nn.Module) -> int:
    """Count what autograd keeps for the backward pass; each storage once, parameters not at all.

    Args:
        run (Callable): Computes an output that requires grad.
        module (nn.Module): Its parameters and buffers are not counted: they are there anyway.

    Returns:
        int: Bytes of the storages, the input's among them if it is kept.

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
        output = run()  # lives until here: no address is given twice
    del output
    return sum(storages.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Measure the most memory that a run holds beyond what was there before it.

    On CUDA as torch's allocator counts it; on the CPU from the allocations that torch's profiler
    sees. Work space that a library takes from the system by itself is in neither.

    Args:
        run (Callable): What to run.
        device (torch.device): Where it runs.

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
    """Time several callables in turns, so that all see the same load of the machine.

    Args:
        runs (dict[str, Callable]): What to time, by name.
        seconds (float): Time to spend, at least ``min_rounds`` rounds whatever they take.
        min_rounds (int): Every callable is timed once a round, after one that does not count.
        device (torch.device): Where they run. On CUDA, events in the stream take the time.
        max_rounds (int): At most so many rounds.

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
        names = names[1:] + names[:1]  # nobody is always behind the same neighbour
    return times


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time one run."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Empties the cache, as the other layers of a network do, and lets the CPU launch ahead.
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
    """Median and quartiles of the ratios of two callables' times, round by round.

    What slows the machine for a while slows both times of a round.

    Example:
        >>> ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
        {'median': 2.0, 'q25': 2.0, 'q75': 2.0}
    """
    return spread(a / b for a, b in zip(times, baseline, strict=True))
