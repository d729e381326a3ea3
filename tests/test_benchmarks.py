"""benchmarks: what is counted, what is rejected, and the table of results."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from statistics import geometric_mean

import pytest
import torch
from torch import nn

from benchmarks import report
from benchmarks.baselines import FORMULAS, Formula
from benchmarks.candidates import OPS, build, builders
from benchmarks.measure import interleaved, peak_bytes, saved_bytes
from benchmarks.parity import differences
from benchmarks.report import NOT_MEASURED, TARGETS
from benchmarks.run import check, parse_args
from benchmarks.sizes import SIZES, InputSize

CPU = torch.device("cpu")
QUICK = ("--shapes", "tiny", "--seconds", "0.01", "--rounds", "2", "--threads", "1")

WRONG = """
from rfa_mmdet.layers import SE, RFAConv

class WrongOutput(SE):
    def forward(self, x):
        return super().forward(x) * 1.001

class WrongStatistics(RFAConv):
    def forward(self, x):
        self.norm.training = True
        return super().forward(x)

class WrongGradient(SE):
    def forward(self, x):
        return x * self.gate(x.detach())

class Raises(SE):
    def forward(self, x):
        raise RuntimeError("not on this machine")
"""


@pytest.fixture(scope="module")
def tiny(run_tool, tmp_path_factory) -> Path:
    """JSON of every op on the tiny shapes."""
    out = tmp_path_factory.mktemp("benchmark") / "new" / "tiny.json"
    done = run_tool(sys.executable, "-m", "benchmarks.run", *QUICK, "--out", out)
    assert done.returncode == 0, done.stdout
    return out


def test_json_of_a_run(tiny):
    run = json.loads(tiny.read_text())
    assert run["machine"]["cpu"]
    assert run["versions"]["torch"] == torch.__version__
    assert (run["device"], run["dtype"], run["threads"]) == ("cpu", "float32", 1)
    assert run["command"].startswith("python -m benchmarks.run --shapes tiny")
    assert run["failed"] == []
    measured = {(r["op"], r["shape"]["stride"]) for r in run["results"]}
    # A plug-in has no stride.
    assert measured == {(op, s) for op in OPS for s in (1, 2) if s == 1 or op.endswith("Conv")}
    for result in run["results"]:
        for mode in ("inference", "training"):
            times, ratios = result[mode]["seconds"], result[mode]["ratios"]
            assert {"plain", "formula"} < times.keys()
            assert ratios.keys() == times.keys() - {"plain"}
            for spread in (*times.values(), *(s for r in ratios.values() for s in r.values())):
                assert 0 < spread["q25"] <= spread["median"] <= spread["q75"]
            assert all(t["rounds"] >= 2 for t in times.values())
            assert min(result[mode]["peak_bytes"].values()) > 0


def test_kept_bytes_of_formula_and_plain_convolution(tiny):
    first = json.loads(tiny.read_text())["results"][0]
    assert (first["op"], first["shape"]) == ("RFAConv", vars(SIZES["tiny"][0]))
    x = 4 * 2 * 64 * 8 * 12
    assert first["saved_bytes"]["plain"] == x
    # The input and its means; nine responses before BN, after ReLU, of the softmax and laid out;
    # two statistics of BN.
    assert first["saved_bytes"]["formula"] == (2 + 4 * 9) * x + 2 * 4 * 64 * 9


def test_table_and_plot(run_tool, tiny, tmp_path):
    table, plot = tmp_path / "new" / "table.md", tmp_path / "plots" / "plot.png"
    done = run_tool(
        sys.executable, "-m", "benchmarks.report", tiny, "--table", table, "--plot", plot
    )
    assert done.returncode == 0, done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    lines = table.read_text().splitlines()
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in lines
        if line.startswith("| ")
    }
    assert {target.text for target in TARGETS} < rows.keys()
    assert all(rows[target.text][3] == NOT_MEASURED for target in TARGETS)  # no GPU in the file
    assert rows[TARGETS[1].text][1] == NOT_MEASURED  # nor torch.compile
    results = json.loads(tiny.read_text())["results"]
    for op in ("SE", "RFCAConv"):
        own = [r for r in results if r["op"] == op]
        slower = geometric_mean(r["training"]["ratios"][op]["plain"]["median"] for r in own)
        faster = geometric_mean(1 / r["inference"]["ratios"][op]["formula"]["median"] for r in own)
        kept = geometric_mean(r["saved_bytes"][op] / r["saved_bytes"]["plain"] for r in own)
        row = rows[f"`{op}`"]
        assert row[0] == f"{faster:.2f}x"
        assert row[1] == row[4] == NOT_MEASURED
        assert row[5] == f"{slower:.2f}x"
        assert row[6].startswith(f"{kept:.2f}x (")


def test_larger_windows_have_separate_rows(run_tool, tmp_path):
    out = tmp_path / "five.json"
    command = ("-m", "benchmarks.run", *QUICK, "--ops", "RFAConv", "--kernel-size", "5")
    done = run_tool(sys.executable, *command, "--out", out)
    assert done.returncode == 0, done.stdout
    run = json.loads(out.read_text())
    assert {r["shape"]["kernel_size"] for r in run["results"]} == {5}
    bytes_of_x = 4 * 2 * 64 * 8 * 12
    assert run["results"][0]["saved_bytes"]["formula"] > 4 * 25 * bytes_of_x
    rows = [line.split(" | ") for line in report.targets_table([run])]
    measured = [row[0] for row in rows[2:] if row[2] != NOT_MEASURED]
    assert len(measured) == 2
    assert all("5x5 windows" in text for text in measured)
    assert "2 shapes with 5x5 windows" in report.run_table(run)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read JSON"), ("no json", "cannot read JSON"), ("[]", "has no results")],
)
def test_other_files_raise(tmp_path, monkeypatch, content, message):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["report.py", str(path)])
    with pytest.raises(SystemExit) as raised:
        report.main()
    assert str(raised.value).startswith(f"error: {path}: {message}")


@pytest.mark.slow
def test_op_that_differs_from_its_formula_is_not_timed(run_tool, tmp_path):
    (tmp_path / "someones.py").write_text(WRONG)
    out, name = tmp_path / "out.json", "SE[someones:WrongOutput]"
    command = (
        "-m",
        "benchmarks.run",
        *QUICK,
        "--ops",
        "SE",
        "--candidate",
        "SE=someones:WrongOutput",
    )
    done = run_tool(sys.executable, *command, "--out", out, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert f"error: {name} differs from the formula of SE; not timed:" in done.stdout
    run = json.loads(out.read_text())
    assert [(f["op"], f["candidate"]) for f in run["failed"]] == [("SE", name)]
    assert (
        "output without a gradient, evaluation, 2x64x9x7: error 1.0e-03"
        in run["failed"][0]["reasons"][0]
    )
    # Our own layer is measured.
    (result,) = run["results"]
    assert result["inference"]["seconds"].keys() == {"plain", "formula", "SE"}
    assert name not in json.dumps(run["results"])
    assert f"| `{name}` | differs from the formula: not timed |" in report.run_table(run)


@pytest.mark.parametrize(
    ("op", "kind", "reason"),
    [
        ("SE", "WrongGradient", "gradient of x, evaluation"),
        ("SE", "Raises", "RuntimeError: not on this machine"),
        ("RFAConv", "WrongStatistics", "output without a gradient, evaluation"),
    ],
)
def test_parity_finds_differences(tmp_path, monkeypatch, op, kind, reason):
    (tmp_path / "others.py").write_text(WRONG)
    monkeypatch.syspath_prepend(tmp_path)
    makers, _ = builders(op, {op: f"others:{kind}"}, CPU)
    args = Namespace(dtype="float32", device=CPU, kernel_size=3)
    found = check(op, makers.pop(f"{op}[others:{kind}]"), [], args)
    assert reason in found[0]
    for make in makers.values():  # ours
        assert check(op, make, [InputSize(1, 32, 6, 5)], args) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ops", "Unknown"], "invalid choice: 'Unknown'"),
        (["--device", "cuda"], "--device cuda: torch finds no CUDA device here"),
        (["--device", "toaster"], "--device toaster: must be cpu or cuda"),
        (["--rounds", "0"], "must be at least 1"),
        (["--kernel-size", "4"], "--kernel-size 4: must be odd"),
        (["--detector", "100"], "--detector 100: must be a multiple of 32, at least 64"),
        (["--candidate", "SE"], "--candidate SE=: must be OP=MODULE:CLASS"),
    ],
)
def test_wrong_arguments_raise(capsys, monkeypatch, argv, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as raised:
        parse_args(["--out", "unused.json", *argv])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("op", FORMULAS)
def test_every_op_matches_its_formula_in_float64(op):
    shape = InputSize(2, 64, 9, 7)
    layer = build(op, shape).double()
    assert differences(op, layer, shape, torch.float64) == []


def test_formula_copies_parameters():
    layer = build("RFAConv", InputSize(1, 4, 5, 5))
    formula = Formula("RFAConv", layer)
    formula.train()(torch.rand(1, 4, 5, 5))
    assert not torch.equal(formula.layer.norm.running_mean, layer.norm.running_mean)
    assert not {p.data_ptr() for p in formula.parameters()} & {
        p.data_ptr() for p in layer.parameters()
    }


# --------------------------------------------------------------------------- counting


def test_kept_bytes_of_known_tensors():
    linear = nn.Linear(5, 7)
    x = torch.rand(3, 5, requires_grad=True)
    gate = torch.rand(7, requires_grad=True)

    def run():
        y = linear(x)  # keeps x (15 floats) and the weight, which is a parameter
        z = y.reshape(7, 3).T * gate  # keeps a view of y (21 floats), and gate (7)
        return z.exp() * y  # keeps the result of exp (21); y is already kept

    assert saved_bytes(run, linear) == 4 * (15 + 21 + 7 + 21)


def test_nothing_is_kept_without_gradients():
    x = torch.rand(3, 5)
    assert saved_bytes(lambda: (x * x).exp(), nn.Identity()) == 0


def test_peak_bytes_of_known_tensors():
    x = torch.rand(100)

    def run():
        a = x.sin()
        b = a.exp()  # two maps of 400 bytes
        del a
        return b.sin()  # two maps again

    assert peak_bytes(run, CPU) == 800


def test_runs_alternate():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleaved(runs, seconds=0.0, min_rounds=3, device=CPU)
    assert {name: len(t) for name, t in times.items()} == dict(a=3, b=3, c=3)
    # A warm-up round; then each round starts with the next callable.
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert len(interleaved(runs, 60.0, 1, CPU, max_rounds=4)["a"]) == 4
