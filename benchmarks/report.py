"""Make a Markdown table and a plot from the JSON files of benchmarks/run.py and benchmarks/gpu.py.

Ratios are geometric means over the shapes of a file. Values that no file has are 'not measured'.
"""

import json
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

import matplotlib

matplotlib.use("Agg")  # no display

from matplotlib import pyplot as plt

from rfa_mmdet.cli.command_line import user_errors
from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole

NOT_MEASURED = "not measured"


def parse_args() -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__,
        epilog="example:\n  python -m benchmarks.report benchmarks/results/*.json "
        "--table benchmarks/table.md --plot docs/images/benchmark.png",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="JSON", help="from run.py or gpu.py"
    )
    parser.add_argument("--table", type=Path, help="Markdown to write; default: print it")
    parser.add_argument("--plot", type=Path, help="PNG to write, from the first file")
    return parser.parse_args()


def runs_of(content: dict) -> list[dict]:
    """Return the runs in a file of run.py, or in the steps of gpu.py, one per configuration.

    If several steps measured a case, the last one counts.

    Args:
        content (dict): JSON of run.py or gpu.py.

    Returns:
        list[dict]: Content as of run.py.

    Example:
        >>> runs_of({"device": "cpu", "results": []})
        [{'device': 'cpu', 'results': []}]
    """
    if "steps" not in content:
        return [content]
    found: dict[tuple, dict] = {}
    for run in (step["result"] for step in content["steps"]):
        if not run or "results" not in run:
            continue
        key = run["dtype"], run["channels_last"]
        old = found.get(key, {"results": [], "failed": [], "detector": None})
        commands = [old["command"], run["command"]] if "command" in old else [run["command"]]
        found[key] = {
            **run,
            "command": " && ".join(commands),
            "results": _latest([*old["results"], *run["results"]], "op", "shape"),
            "failed": _latest([*old["failed"], *run["failed"]], "op", "candidate"),
            "detector": run["detector"] or old["detector"],
        }
    return list(found.values())


def _latest(entries: list[dict], *keys: str) -> list[dict]:
    return list({str([entry[key] for key in keys]): entry for entry in entries}.values())


def mean_ratio(run: dict, candidate: str, mode: str, baseline: str) -> float | None:
    """Return the geometric mean over shapes of the ratio of a candidate's time to a baseline's."""
    found = [
        result[mode]["ratios"][candidate][baseline]["median"]
        for result in run["results"]
        if baseline in result[mode]["ratios"].get(candidate, {})
        and result["op"] == op_of(candidate, result)
    ]
    return geometric_mean(found) if found else None


def op_of(candidate: str, result: dict) -> str:
    """Return the op that a candidate computes; baselines exist for every op."""
    return result["op"] if candidate in ("formula", "compiled formula") else candidate.split("[")[0]


def mean_bytes(
    run: dict, candidate: str, kind: Callable[[dict], dict], baseline: str
) -> float | None:
    """Return the geometric mean over shapes of the ratio of a candidate's bytes to a baseline's."""
    pairs = [
        (kind(result)[candidate], kind(result)[baseline])
        for result in run["results"]
        if result["op"] == op_of(candidate, result) and candidate in kind(result)
    ]
    return geometric_mean([a / b for a, b in pairs]) if pairs else None


def saved(result: dict) -> dict:
    """Return the bytes kept for the backward pass."""
    return result["saved_bytes"]


def training_peak(result: dict) -> dict:
    """Return the peak bytes of forward + backward."""
    return result["training"]["peak_bytes"]


def of_op(run: dict, op: str) -> dict:
    """Return a run with the results of only one op."""
    return {**run, "results": [result for result in run["results"] if result["op"] == op]}


def candidates(run: dict) -> list[str]:
    """Return the names of candidates in order, without baselines."""
    names = {n: None for result in run["results"] for n in result["saved_bytes"]}
    return [name for name in names if name not in ("plain", "formula")]


# --------------------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """A row of the table: targets for RFAConv on a CPU and on a GPU, and how to get the value."""

    text: str
    unit: str
    cpu: float
    gpu: float | None  # None: no target
    value: Callable[[dict, str], float | None]
    faster: bool = False  # higher is better
    kernel_size: int = 3
    cpu_half: float | None = None  # for bfloat16 on the CPU; None: as for float32

    def verdict(self, value: float, device: str, dtype: str) -> str:
        """Return a remark if a measured value misses the target."""
        limit = self.cpu if device == "cpu" else self.gpu
        if device == "cpu" and dtype != "float32" and self.cpu_half is not None:
            limit = self.cpu_half
        met = limit is None or (value >= limit if self.faster else value <= limit)
        return "" if met else ", missed"

    def limit(self, device: str) -> str:
        """Format the target."""
        value = self.cpu if device == "cpu" else self.gpu
        if value is None:
            return ""
        half = f" (bfloat16: {self.cpu_half:g}x)" if device == "cpu" and self.cpu_half else ""
        return f"{'>=' if self.faster else '<='} {value:g}x{self.unit}{half}"


def _speed(mode: str, baseline: str) -> Callable[[dict, str], float | None]:
    def value(run: dict, candidate: str) -> float | None:
        ratio = mean_ratio(run, candidate, mode, baseline)
        return ratio and 1 / ratio

    return value


def _of_detector(key: Callable[[dict], float]) -> Callable[[dict, str], float | None]:
    return lambda run, candidate: key(run["detector"]) if run.get("detector") else None


TARGETS = (
    Target("inference vs. the authors' formula (eager)", " faster", 8, 5,
           _speed("inference", "formula"), True),
    Target("inference vs. the compiled formula", " faster", 5, 2,
           _speed("inference", "compiled formula"), True),
    Target("inference vs. the plain convolution", " its time", 1.3, 2.0,
           lambda run, c: mean_ratio(run, c, "inference", "plain"), cpu_half=2.0),
    Target("forward + backward vs. the authors' formula (eager)", " faster", 2.5, 4,
           _speed("training", "formula"), True),
    Target("forward + backward vs. the plain convolution", " its time", 1.5, 2.5,
           lambda run, c: mean_ratio(run, c, "training", "plain"), cpu_half=2.5),
    *(
        Target(f"{mode}, {k}x{k} windows vs. the plain convolution", " its time", limit, None,
               lambda run, c, key=key: mean_ratio(run, c, key, "plain"), kernel_size=k)
        for k, limits in ((5, (1.5, 2.0)), (7, (2.0, 2.5)))
        for mode, key, limit in zip(
            ("inference", "forward + backward"), ("inference", "training"), limits, strict=True)
    ),
    Target("bytes kept for backward vs. the plain convolution", "", 1.1, 1.1,
           lambda run, c: mean_bytes(run, c, saved, "plain")),
    Target("RetinaNet R50-FPN training iteration, time vs. plain", "", 1.3, 1.2,
           _of_detector(lambda d: d["time_ratio"]["median"])),
    Target("RetinaNet R50-FPN training iteration, peak memory vs. plain", "", 1.1, 1.1,
           _of_detector(lambda d: d["peak_ratio"])),
)  # fmt: skip


def configuration(run: dict) -> str:
    """Return the dtype of a run, and its layout unless it is the default."""
    return run["dtype"] + (", channels_last" if run["channels_last"] else "")


def kernel_size(run: dict) -> int:
    """Return the window size of a run."""
    return run.get("kernel_size", 3)  # older files have only 3


def chosen_rfaconv(run: dict) -> str | None:
    """Return RFAConv's candidate with the backend that 'auto' selects on the run's device."""
    name = {"cpu": "RFAConv[cpu]", "cuda": "RFAConv[triton]"}[run["device"]]
    names = [n for n in candidates(of_op(run, "RFAConv")) if ":" not in n]
    return name if name in names else next(iter(names), None)


def targets_table(runs: list[dict]) -> list[str]:
    """Return a table of RFAConv's targets and measurements.

    Args:
        runs (list[dict]): Runs from :func:`runs_of`.

    Returns:
        list[str]: Lines of Markdown.
    """
    titles = ("RFAConv", "CPU: target", "CPU: measured", "GPU: target", "GPU: measured")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for target in TARGETS:
        cells = [target.text]
        for device in ("cpu", "cuda"):
            texts = []
            for run in runs:
                if run["device"] != device or kernel_size(run) != target.kernel_size:
                    continue
                value = target.value(of_op(run, "RFAConv"), chosen_rfaconv(run) or "")
                if value is not None:
                    verdict = target.verdict(value, device, run["dtype"])
                    texts.append(f"{value:.2f}x ({configuration(run)}{verdict})")
            cells += [target.limit(device), "<br>".join(texts) or NOT_MEASURED]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# --------------------------------------------------------------------------- one run


def _times(value: float | None, digits: int = 2) -> str:
    return NOT_MEASURED if value is None else f"{value:.{digits}f}x"


def run_table(run: dict) -> list[str]:
    """Return a table of one run, with a row per candidate.

    Args:
        run (dict): A run from :func:`runs_of`.

    Returns:
        list[str]: Lines of Markdown.
    """
    machine = run["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    shapes = {tuple(result["shape"].values()) for result in run["results"]}
    counts = Counter(result["op"] for result in run["results"])
    fewest = min(counts.values(), default=0)
    of_plugins = "" if fewest == len(shapes) else f" ({fewest} for plug-ins, which have no stride)"
    side = kernel_size(run)
    windows = "" if side == 3 else f" with {side}x{side} windows"
    lines = [
        f"**{where}; {configuration(run)}; {run['threads']} threads; "
        f"torch {run['versions']['torch']}; {len(shapes)} shapes{windows}{of_plugins}.** "
        f"`{run['command']}`",
        "",
        "| | inference: faster than the formula | than it compiled | time / plain's "
        "| forward + backward: faster than the formula | than it compiled | time / plain's "
        "| kept bytes / plain's (the formula's) | kept bytes / the formula's "
        "| peak bytes / plain's (the formula's) |",
        "|---|" + "---:|" * 9,
    ]
    for name in candidates(run):
        own = of_op(run, name.split("[")[0])
        cells = [f"`{name}`"]
        for mode in ("inference", "training"):
            for baseline in ("formula", "compiled formula"):
                cells.append(_times(_speed(mode, baseline)(own, name)))
            cells.append(_times(mean_ratio(own, name, mode, "plain")))
        for kind in (saved, training_peak):
            ours, theirs = (mean_bytes(own, who, kind, "plain") for who in (name, "formula"))
            cells.append(f"{_times(ours)} ({_times(theirs)})")
            if kind is saved:
                cells.append(_times(mean_bytes(own, name, kind, "formula")))
        lines.append(f"| {' | '.join(cells)} |")
    for failure in run["failed"]:
        lines.append(f"| `{failure['candidate']}` | differs from the formula: not timed |")
    if detector := run.get("detector"):
        seconds = detector["seconds"]
        lines += [
            "",
            f"{detector['model']}, one training iteration, batch {detector['batch']}, "
            f"{detector['size']} x {detector['size']}: {detector['time_ratio']['median']:.2f}x the "
            f"time (quartiles {detector['time_ratio']['q25']:.2f} to "
            f"{detector['time_ratio']['q75']:.2f}; {seconds['RFAConv']['median']:.2f} s against "
            f"{seconds['plain']['median']:.2f} s), {detector['peak_ratio']:.2f}x the peak memory.",
        ]
    return lines


def steps_table(content: dict) -> list[str]:
    """Return a table of the steps of gpu.py.

    Args:
        content (dict): JSON of gpu.py.

    Returns:
        list[str]: Lines of Markdown.
    """
    where = ", ".join(content["gpus"]) or "no GPU"
    counts = Counter(step["state"] for step in content["steps"])
    states = ", ".join(f"{number} {state}" for state, number in counts.items())
    lines = [
        f"**{where}; torch {content['torch']}; {states}.** `{content['command']}`",
        "",
        "| step | | seconds | |",
        "|---|---|---:|---|",
    ]
    for step in content["steps"]:
        said = step["said"].replace("|", r"\|")
        lines.append(f"| {step['name']} | {step['state']} | {step['seconds']:.0f} | {said} |")
    return lines


def tables(contents: list[dict]) -> list[str]:
    """Return all tables: the targets, then each file.

    Args:
        contents (list[dict]): JSON of run.py or gpu.py.

    Returns:
        list[str]: Lines of Markdown.
    """
    lines = targets_table([run for content in contents for run in runs_of(content)])
    for content in contents:
        lines += ["", *steps_table(content)] if "steps" in content else []
        for run in runs_of(content):
            lines += ["", *run_table(run)]
    return lines


def write_plot(run: dict, path: Path) -> None:
    """Plot time and kept bytes of each op and its formula, relative to plain.

    Args:
        run (dict): A run from :func:`runs_of`.
        path (Path): PNG to write.
    """
    names, side = candidates(run), kernel_size(run)
    columns = (
        ("inference, time", lambda own, name: mean_ratio(own, name, "inference", "plain")),
        ("forward + backward, time", lambda own, name: mean_ratio(own, name, "training", "plain")),
        ("bytes kept for the backward", lambda own, name: mean_bytes(own, name, saved, "plain")),
    )
    size = (12, 1.2 + 0.42 * len(names))
    figure, all_axes = plt.subplots(1, 3, figsize=size, sharey=True, layout="constrained")
    for axes, (title, value) in zip(all_axes, columns, strict=True):
        for row, name in enumerate(names):
            own = of_op(run, name.split("[")[0])
            for who, offset, colour in (("formula", 0.2, "#c8c8c8"), (name, -0.2, "#2c7fb8")):
                bar = value(own, who)
                axes.barh(len(names) - row + offset, bar, 0.38, color=colour)
                axes.text(bar, len(names) - row + offset, f" {bar:.2g}", va="center", fontsize=7)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=title, xlabel=f"plain {side}x{side} convolution = 1", xscale="log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.15)
        axes.set_xticks([0.25, 0.5, 1, 2, 4, 8, 16, 32], ["1/4", "1/2", *"1248", "16", "32"])
        axes.minorticks_off()
    all_axes[0].set_yticks([len(names) - row for row in range(len(names))], names)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in ("#c8c8c8", "#2c7fb8")]
    figure.legend(handles, ["authors' formula, eager", "here"], loc="outside lower right", ncols=2)
    with written_whole(path) as part:
        figure.savefig(part, dpi=120)
    plt.close(figure)


def main() -> None:
    """Write the table and the plot."""
    args = parse_args()
    contents = []
    for path in args.results:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SystemExit(f"error: {path}: cannot read JSON: {error}") from None
        if not isinstance(content, dict) or not (
            "steps" in content or {"results", "machine", "device"} <= content.keys()
        ):
            raise SystemExit(f"error: {path}: has no results of run.py or gpu.py")
        contents.append(content)
    text = "\n".join(tables(contents)) + "\n"
    if args.table:
        with written_whole(args.table) as part:
            part.write_text(text, encoding="utf-8")
        print(f"wrote: {args.table}")
    else:
        print(text, end="")
    if args.plot:
        runs = [run for run in runs_of(contents[0]) if candidates(run)]
        if not runs:
            raise SystemExit(f"error: {args.results[0]}: has no op to plot")
        write_plot(runs[0], args.plot)
        print(f"wrote: {args.plot}")


if __name__ == "__main__":
    with user_errors(UserError):
        main()
