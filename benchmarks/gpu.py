"""Check and measure the package on a GPU: what `make gpu` runs.

Every step is a separate process with a time limit, so a failing or hanging step does not affect the
others. Steps share the time by weight; unused time goes to later steps, and steps without any time
left are listed. After each step, gpu.json and gpu.md are updated; gpu.log has the output of the
steps. Exit code: 0, 1 if a step failed, 2 if there is no GPU.

Without a GPU, try the steps with --device cpu --tiny.
"""

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import report
from rfa_mmdet.cli.command_line import user_errors
from rfa_mmdet.cpus import available_cpus
from rfa_mmdet.errors import UserError
from rfa_mmdet.files import check_folder, written_whole

ROOT = Path(__file__).resolve().parents[1]
LEAST = 10.0  # minimum seconds for starting a step
OPS = ("RFAConv", "RFCBAMConv", "RFCAConv")
PARITY = tuple(
    f"tests/ops/receptive_field/test_triton{name}.py" for name in ("", "_gates", "_strides")
)
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
PROBE = """
import json, torch
cards = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
names = [torch.cuda.get_device_name(card) for card in cards]
print(json.dumps({"torch": torch.__version__, "gpus": names}))
"""


@dataclass(frozen=True)
class Step:
    """One process.

    Args:
        name (str): Name shown to the user.
        weight (float): Share of the time, relative to the other steps.
        command (tuple[str, ...]): Command line, in which '{out}' stands for the path of a JSON file
            to write, and '{stop}' for the seconds after which to start nothing new.
        environment (dict[str, str]): Additional environment variables.
        skip (str): Why to skip the step; '' if it should run.
    """

    name: str
    weight: float
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    skip: str = ""


def plan(device: str, tiny: bool, gpus: int) -> list[Step]:
    """Return the steps, most informative first; weights are roughly the seconds they need.

    Args:
        device (str): 'cuda' or 'cpu'.
        tiny (bool): Whether to only try each step with small inputs.
        gpus (int): Number of GPUs.

    Returns:
        list[Step]: All steps, including those to skip.
    """
    no_gpu = "" if gpus else "there is no GPU"
    one_gpu = "" if gpus > 1 else no_gpu or "there is one GPU"
    sanitizer = shutil.which("compute-sanitizer", path=PATH)
    no_sanitizer = no_gpu or ("" if sanitizer else "compute-sanitizer is not installed")

    def module(name: str, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, "-m", name, *arguments)

    def check(what: str, *arguments: str) -> tuple[str, ...]:
        return module("benchmarks.device_checks", what, "--device", device, *arguments)

    def bench(*arguments: str) -> tuple[str, ...]:
        return module("benchmarks.run", "--stop-after", "{stop}", "--out", "{out}", *arguments)

    def parity(name: str, weight: float, selection: str) -> Step:
        command = module("pytest", "-q", "-rs", "-p", "no:cacheprovider", *PARITY, "-k", selection)
        if gpus and importlib.util.find_spec("xdist"):  # compilation dominates
            command += ("-n", str(min(16, available_cpus())))
        return Step(name, weight, command, {} if gpus else {"TRITON_INTERPRET": "1"})

    on = ("--device", device)
    glance = ("--shapes", "tiny", "--seconds", "0.02", "--rounds", "2", "--threads", "1")
    layers = (*on, *(glance if tiny else ("--shapes", "gpu", "--seconds", "0.2", "--rounds", "10")))
    layers += ("--ops", *OPS)
    detector = glance if tiny else ("--seconds", "0.5", "--rounds", "5")
    detector += (*on, "--ops", "--detector", "64" if tiny else "800")
    bfloat16, last = ("--dtype", "bfloat16"), ("--channels-last",)
    steps = [
        parity("parity, float32, NCHW", 60, "not (float16 or channels_last)"),
        parity("parity, other types and layouts", 50, "float16 or channels_last"),
        Step("compilation", 90, check("compile"), skip=no_gpu),
        Step(
            "compute-sanitizer",
            60,
            (sanitizer or "", "--error-exitcode", "86", *check("cases")),
            # With PyTorch's allocator, a write past a tensor would land in another one unnoticed.
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            no_sanitizer,
        ),
        Step("CUDA graphs", 25, check("graphs"), skip=no_gpu),
        Step(
            "second device",
            25,
            module(
                *("benchmarks.run", "--device", "cuda:1", *glance, "--ops", *OPS),
                *("--out", "{out}.second"),  # not reported
            ),
            skip=one_gpu,
        ),
        Step("layers, float32", 60, bench(*layers)),
        Step("layers, bfloat16, channels_last", 60, bench(*layers, *bfloat16, *last)),
        Step("RetinaNet, float32", 35, bench(*detector)),
        Step("training", 50, check("training", "--out", "{out}", *(["--tiny"] if tiny else []))),
    ]
    if tiny:
        return [parity("parity, one case", 20, "nan_and_infinity"), *steps[2:]]
    return [
        *steps,
        # mmcv's focal loss does not support bfloat16.
        Step("RetinaNet, float16", 35, bench(*detector, "--dtype", "float16")),
        Step("layers, bfloat16", 50, bench(*layers, *bfloat16)),
        Step("layers, float32, channels_last", 50, bench(*layers, *last)),
        # Slow, because Inductor compiles for each shape. These cases replace the same ones above.
        Step("compiled formulas, float32", 60, bench(*layers, "--compile")),
        Step(
            "compiled formulas, bfloat16, channels_last",
            60,
            bench(*layers, "--compile", *bfloat16, *last),
        ),
    ]


def run_step(step: Step, seconds: float, out: Path, log: Path) -> dict:
    """Run a step in a new process group, and kill the group when time is up.

    Args:
        step (Step): The step.
        seconds (float): Time limit.
        out (Path): JSON file for the step to write.
        log (Path): File to append its output to.

    Returns:
        dict: ``state`` ('passed' or 'failed'), ``said`` (the reason, and notable output),
        ``seconds``, ``result`` (the JSON, maybe partial; None if there is none).
    """
    command = [
        part.replace("{out}", str(out)).replace("{stop}", f"{0.7 * seconds:.0f}")
        for part in step.command
    ]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    start, code = time.monotonic(), None
    with log.open("ab") as file:
        file.write(f"\n==== {step.name}: {shlex.join(command)}\n".encode())
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(seconds)
        finally:
            with suppress(ProcessLookupError):  # the group is gone
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # a hanging driver may block it forever
                process.wait(10)
    result = None
    for path in (out.with_name(f"{out.name}.unfinished"), out):
        with suppress(OSError, ValueError):
            result = json.loads(path.read_text(encoding="utf-8"))
    if result and "command" in result:
        result["command"] = shlex.join(["python", *step.command[1:]])  # without local paths
    lines = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
    notes = [line for line in lines if line.startswith(("error: ", "no time left: "))]
    if not notes and code == 0 and result and "results" in result:
        notes = [f"{len(result['results'])} cases"]
        if detector := result["detector"]:
            time_, memory = detector["time_ratio"]["median"], detector["peak_ratio"]
            notes = [f"{time_:.2f}x the plain detector's time, {memory:.2f}x its memory"]
    said = notes or lines[-1:]
    if code is None:
        said = [f"killed at its limit of {seconds:.0f} s", *said]
    elif code < 0:
        said = [f"killed by {signal.Signals(-code).name}", *said]
    elif code > 0:
        said = said or [f"exit code {code}"]
    return dict(
        state="failed" if code != 0 else "passed",
        said="; ".join(said),
        seconds=round(time.monotonic() - start, 1),
        result=result,
    )


def run_steps(steps: list[Step], seconds: float, folder: Path, content: dict) -> None:
    """Run the steps in order, and write the results after each.

    Args:
        steps (list[Step]): The steps.
        seconds (float): Time limit for all of them.
        folder (Path): Folder for gpu.json, gpu.md and gpu.log.
        content (dict): Content of gpu.json; this adds ``steps``.
    """
    end = time.monotonic() + seconds
    log, content["steps"] = folder / "gpu.log", []
    log.write_bytes(b"")
    with TemporaryDirectory() as scratch:
        for number, step in enumerate(steps):
            lead = f"[{number + 1}/{len(steps)}] {step.name}"
            left = end - time.monotonic()
            done = dict(state="not run", said="no time left", seconds=0.0, result=None)
            if step.skip:
                done |= dict(state="skipped", said=step.skip)
            elif left >= LEAST:
                weights = sum(other.weight for other in steps[number:] if not other.skip)
                limit = min(left, max(left * step.weight / weights, LEAST))
                print(f"{lead}: at most {limit:.0f} s", flush=True)
                done = run_step(step, limit, Path(scratch, f"{number}.json"), log)
            content["steps"].append({"name": step.name, **done})
            print(f"{lead}: {done['state']}, {done['seconds']:.0f} s: {done['said']}", flush=True)
            write(content, folder)


def write(content: dict, folder: Path) -> None:
    """Write gpu.json, and gpu.md generated from it."""
    with written_whole(folder / "gpu.json") as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    with written_whole(folder / "gpu.md") as part:
        part.write_text("\n".join(report.tables([content])) + "\n", encoding="utf-8")


def find_gpus() -> dict:
    """Return torch's version and the names of its GPUs, from a subprocess, because it may hang.

    Raises:
        UserError: If torch fails or does not answer.
    """
    command = [sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    except subprocess.TimeoutExpired:
        raise UserError("torch did not detect GPUs within 120 s") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        raise UserError(f"torch failed: {lines[-1]}") from None
    return json.loads(done.stdout.splitlines()[-1])


def parse_args(argv: list[str]) -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__,
        epilog="example:\n  python -m benchmarks.gpu --out work_dirs/gpu",
        formatter_class=RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the three files; created if missing")
    add(
        "--minutes",
        type=float,
        default=20.0,
        help="limit for all steps together (default: %(default)s)",
    )
    add("--device", choices=["cuda", "cpu"], default="cuda", help="default: %(default)s")
    add(
        "--tiny",
        action="store_true",
        help="only check that every step works, with few small inputs",
    )
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes}: must be more than 0")
    return args


def main(argv: list[str]) -> int:
    """Run all steps; return the exit code."""
    args = parse_args(argv)
    start = time.monotonic()
    check_folder(args.out, "--out")
    found = find_gpus()
    if args.device == "cuda" and not found["gpus"]:
        print(f"no GPU: torch {found['torch']} finds no CUDA device here", file=sys.stderr)
        return 2
    gpus = found["gpus"] if args.device == "cuda" else []
    content = {
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *argv]),
        "torch": found["torch"],
        "gpus": gpus,
        "minutes": args.minutes,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    seconds = 60 * args.minutes - (time.monotonic() - start)
    run_steps(plan(args.device, args.tiny, len(gpus)), seconds, args.out, content)
    states = [step["state"] for step in content["steps"]]
    print(f"wrote: {args.out}/gpu.json, gpu.md, gpu.log")
    return 1 if "failed" in states else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that SIGTERM also kills the step
    with user_errors(UserError):
        raise SystemExit(main(sys.argv[1:]))
