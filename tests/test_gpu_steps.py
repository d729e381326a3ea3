"""benchmarks/gpu.py: steps as real processes, their time limits, and the table."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import device_checks, gpu, report, run
from benchmarks.gpu import LEAST, Step, plan, run_step, run_steps
from rfa_mmdet.errors import UserError
from tests.helpers.paths import ROOT
from tests.helpers.processes import PATIENCE, wait_until
from tests.helpers.torch_features import LACKS_TRITON

GPU = {"command": "python -m benchmarks.gpu", "torch": "2.13.0", "gpus": ["a GPU"]}
QUICK = ("--shapes", "tiny", "--seconds", "0.01", "--rounds", "2", "--threads", "1")


def shell(name: str, script: str, weight: float = 1.0, **options) -> Step:
    return Step(name, weight, ("sh", "-c", script), **options)


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    """JSON of RFAConv on the tiny shapes."""
    out = tmp_path_factory.mktemp("measured") / "run.json"
    assert run.main([*QUICK, "--ops", "RFAConv", "--out", str(out)]) == 0
    return json.loads(out.read_text())


# --------------------------------------------------------------------------- steps


def test_failing_steps_do_not_affect_others(tmp_path, capsys):
    written = tmp_path / "gpu.json"
    steps = [
        shell("good", """echo '{"number": 1}' > {out}; echo all is well"""),
        shell("wrong", "echo first; echo 'error: no such thing'; echo later; exit 3"),
        shell("silent", "exit 4"),
        shell("shot", "kill -SEGV $$"),
        shell("left out", "exit 1", skip="there is one GPU"),
        shell("between", f"grep -c state {written}"),
        shell("no JSON", "echo '{' > {out}; echo $COLOUR", environment={"COLOUR": "blue"}),
    ]
    content = {**GPU}
    run_steps(steps, 1000, tmp_path, content)
    assert [(step["name"], step["state"], step["said"]) for step in content["steps"]] == [
        ("good", "passed", "all is well"),
        ("wrong", "failed", "error: no such thing"),
        ("silent", "failed", "exit code 4"),
        ("shot", "failed", "killed by SIGSEGV"),
        ("left out", "skipped", "there is one GPU"),
        ("between", "passed", "5"),  # the JSON is written after each step
        ("no JSON", "passed", "blue"),
    ]
    assert [step["result"] for step in content["steps"]] == [{"number": 1}, *[None] * 6]
    assert json.loads(written.read_text()) == content
    table = (tmp_path / "gpu.md").read_text()
    assert "**a GPU; torch 2.13.0; 3 passed, 3 failed, 1 skipped.**" in table
    assert "| wrong | failed | 0 | error: no such thing |" in table
    assert "first\nerror: no such thing\nlater\n" in (tmp_path / "gpu.log").read_text()
    assert "[5/7] left out: skipped, 0 s: there is one GPU\n" in capsys.readouterr().out


def test_hanging_step_is_killed_with_its_children_and_its_output_is_kept(tmp_path):
    fifo = tmp_path / "held"  # open for writing while any of the processes is alive
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    script = f"exec 9> {fifo}; echo begun; echo '[1]' > {{out}}.unfinished; sleep 1000 & wait"
    for seconds in (2, 20, 200):  # the machine may be busy
        done = run_step(shell("hangs", script), seconds, tmp_path / "0.json", tmp_path / "log")
        if done["result"]:
            break
    assert (done["state"], done["result"]) == ("failed", [1])
    assert done["said"] == f"killed at its limit of {seconds} s; begun"

    def is_closed() -> bool:
        try:
            return os.read(reader, 1) == b""
        except BlockingIOError:
            return False

    wait_until(is_closed)
    os.close(reader)


def test_steps_share_time_by_weight_and_unused_time_is_passed_on(tmp_path):
    content = {**GPU}
    steps = [
        shell("a quarter of the time", "echo {stop}"),
        shell("skipped, so its weight does not count", "", weight=1000.0, skip="no"),
        shell("all remaining time", "echo {stop}", weight=3.0),
    ]
    run_steps(steps, 1e6, tmp_path, content)
    first, _, last = (step["said"] for step in content["steps"])
    # {stop} is 0.7 of the limit; the first step took at most a few seconds.
    assert 174_000 < int(first) <= 175_000
    assert 695_000 < int(last) <= 700_000


def test_every_step_gets_a_minimum_of_time(tmp_path):
    content = {**GPU}
    steps = [shell("light", "echo {stop}"), shell("heavy", "echo {stop}", weight=1e9)]
    run_steps(steps, 1000, tmp_path, content)
    assert content["steps"][0]["said"] == f"{0.7 * LEAST:.0f}"


def test_steps_without_time_are_listed(tmp_path):
    content = {**GPU}
    run_steps([shell("late", "exit 1"), shell("later", "exit 1")], LEAST / 2, tmp_path, content)
    assert [(step["state"], step["said"]) for step in content["steps"]] == [
        ("not run", "no time left")
    ] * 2
    assert "| late | not run | 0 | no time left |" in (tmp_path / "gpu.md").read_text()


def test_no_gpu_prints_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.main(["--out", str(tmp_path / "new")]) == 2
    line = f"no GPU: torch {torch.__version__} finds no CUDA device here\n"
    assert capsys.readouterr() == ("", line)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_sigterm_kills_the_running_step(environment, tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny"]
    whole = subprocess.Popen([*command, "--out", str(tmp_path)], cwd=ROOT, env=environment)
    log = tmp_path / "gpu.log"

    def has_printed() -> bool:  # after the line with its name
        return log.exists() and log.read_bytes().split(b"\n", 2)[2:] > [b""]

    wait_until(has_printed, whole)
    children = Path(f"/proc/{whole.pid}/task/{whole.pid}/children")
    (step,) = children.read_text().split()
    whole.terminate()
    assert whole.wait(PATIENCE) == 130
    assert not Path("/proc", step).exists()


# --------------------------------------------------------------------------- the plan


def test_steps_for_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    steps = plan("cuda", False, 2)
    assert steps[0].name == "parity, float32, NCHW"
    assert len({step.name for step in steps}) == len(steps)
    assert {step.name for step in steps if step.skip} <= {"compute-sanitizer"}
    measured = set()
    for step in steps:
        if "benchmarks.run" in step.command:
            arguments = [part.replace("{stop}", "9") for part in step.command[3:]]
            args = run.parse_args(arguments)  # exits on an unknown argument
            assert args.device.type == "cuda"
            assert args.ops == ([] if args.detector else ["RFAConv", "RFCBAMConv", "RFCAConv"])
            kind = "RetinaNet" if args.detector else "layers"
            measured.add((kind, args.dtype, args.channels_last, bool(args.compile)))
    layers = {("layers", dtype, last) for dtype in ("float32", "bfloat16") for last in (0, 1)}
    assert layers <= {case[:3] for case in measured}
    assert {("layers", "float32", False, True), ("RetinaNet", "float32", False, False)} <= measured


def test_steps_skipped_with_one_gpu_or_none():
    skipped = {step.name: step.skip for step in plan("cuda", False, 1)}
    assert skipped["second device"] == "there is one GPU"
    skipped = {step.name: step.skip for step in plan("cpu", True, 0) if step.skip}
    assert skipped == dict.fromkeys(
        ["compilation", "compute-sanitizer", "CUDA graphs", "second device"], "there is no GPU"
    )


@pytest.mark.slow
@pytest.mark.skipif(LACKS_TRITON, reason=str(LACKS_TRITON))
def test_parity_steps_select_different_tests():
    found = []
    for step in plan("cpu", False, 0)[:2]:
        command = [*step.command, "--collect-only"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        found.append({line for line in done.stdout.splitlines() if "::" in line})
    assert all(found)
    assert not found[0] & found[1]


@pytest.mark.slow
@pytest.mark.skipif(LACKS_TRITON, reason=str(LACKS_TRITON))
def test_every_step_works_on_a_cpu(run_tool, tmp_path):
    command = ("-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--minutes", "60")
    done = run_tool(sys.executable, *command, "--out", tmp_path)
    assert done.returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.md", "gpu.log"}
    content = json.loads((tmp_path / "gpu.json").read_text())
    steps = {step["name"]: step for step in content["steps"]}
    assert {step["state"] for step in steps.values()} == {"passed", "skipped"}
    assert steps["training"]["result"]["iterations"] == 18
    runs = report.runs_of(content)
    assert [run["dtype"] for run in runs] == ["float32", "bfloat16"]
    assert runs[0]["detector"]["time_ratio"]["median"] > 0
    assert str(tmp_path) not in json.dumps(runs)
    done = run_tool(sys.executable, "-m", "benchmarks.report", tmp_path / "gpu.json")
    assert done.stdout == (tmp_path / "gpu.md").read_text()


# --------------------------------------------------------------------------- what the steps run


def test_run_without_time_lists_what_is_left(tmp_path, capsys):
    out = tmp_path / "run.json"
    assert run.main([*QUICK, "--ops", "RFAConv", "--stop-after", "0", "--out", str(out)]) == 0
    assert "no time left: RFAConv 2x64x8x12, RFAConv 2x64x9x7/2\n" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["results"] == []
    assert content["no_time_left"] == ["RFAConv 2x64x8x12", "RFAConv 2x64x9x7/2"]


def test_small_cases(monkeypatch):
    assert device_checks.check_cases(torch.device("cpu")) == "48 small cases"
    build = device_checks.build

    def damaged(op, shape):
        layer = build(op, shape)
        layer.conv.weight.data[0] = torch.nan
        return layer

    monkeypatch.setattr(device_checks, "build", damaged)
    with pytest.raises(UserError, match=r"^RFAConv 2x16x9x7 .*evaluation: output .*: not finite"):
        device_checks.check_cases(torch.device("cpu"))


@pytest.mark.parametrize("wrong", [1.01, torch.nan])
def test_graph_results_are_compared(wrong):
    right = {"output": torch.rand(3, 4)}
    device_checks._compare("a layer", {"output": right["output"] + 1e-6}, right)
    with pytest.raises(UserError, match="a layer: output in a CUDA graph: error"):
        device_checks._compare("a layer", {"output": right["output"] * wrong}, right)


# --------------------------------------------------------------------------- the table


def as_on_a_gpu(measured: dict) -> dict:
    content = copy.deepcopy(measured)
    content["device"], content["machine"]["gpu"] = "cuda", "a GPU"
    return content


def gpu_cells(contents: list[dict]) -> list[str]:
    runs = [run for content in contents for run in report.runs_of(content)]
    return [line.split("|")[5].strip() for line in report.targets_table(runs)[2:]]


def steps_of(*results: dict | None) -> dict:
    steps = [dict(name="layers", state="passed", said="", seconds=1.0, result=r) for r in results]
    return {**GPU, "steps": steps}


def test_gpu_columns_only_use_gpus(measured):
    on_gpu = as_on_a_gpu(measured)
    assert set(gpu_cells([measured])) == {report.NOT_MEASURED}
    # Nor do steps tried on a CPU count.
    assert set(gpu_cells([steps_of(measured)])) == {report.NOT_MEASURED}
    assert "x (float32" in gpu_cells([measured, on_gpu])[0]
    cells = gpu_cells([measured, steps_of(None, {"iterations": 18}, on_gpu)])
    assert "x (float32" in cells[0]
    assert cells[1] == report.NOT_MEASURED  # no torch.compile in it
    both = gpu_cells([steps_of(on_gpu, {**on_gpu, "channels_last": True})])[0]
    assert both.count("<br>") == 1
    assert "(float32, channels_last" in both


def test_steps_of_a_configuration_are_merged(measured):
    first = as_on_a_gpu(measured)
    first["failed"] = [dict(op="SE", candidate="SE", reasons=["differs"])]
    detector = {**first, "results": [], "failed": [], "detector": {"size": 800}, "command": "b"}
    again = as_on_a_gpu(measured)
    again["results"] = again["results"][1:]
    again["results"][0]["saved_bytes"] = {"plain": 1, "formula": 2, "RFAConv": 3}
    again["failed"] = first["failed"]
    (whole,) = report.runs_of(steps_of({**first, "command": "a"}, detector, again))
    assert whole["results"] == [first["results"][0], again["results"][0]]
    assert whole["failed"] == first["failed"]
    assert whole["detector"] == {"size": 800}
    assert whole["command"] == f"a && b && {measured['command']}"
    assert first["results"][1]["saved_bytes"] != again["results"][0]["saved_bytes"]


def test_report_accepts_both_kinds_of_files(measured, tmp_path, monkeypatch, capsys):
    paths = [tmp_path / "cpu.json", tmp_path / "gpu.json"]
    for path, content in zip(paths, (measured, steps_of(as_on_a_gpu(measured))), strict=True):
        path.write_text(json.dumps(content))
    plot = tmp_path / "plot.png"
    arguments = [*paths, "--plot", plot]
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    report.main()
    printed = capsys.readouterr().out
    assert "**a GPU; torch 2.13.0; 1 passed.** `python -m benchmarks.gpu`" in printed
    assert "| layers | passed | 1 |  |" in printed
    assert "**a GPU; float32; 1 threads;" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")
