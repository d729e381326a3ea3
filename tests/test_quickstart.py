"""docs/quickstart.ipynb, from its first cell to its last."""

import os

import nbclient
import nbformat
import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes import PATIENCE


@pytest.mark.slow
def test_quickstart(environment, monkeypatch):
    path = ROOT / "docs" / "quickstart.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for name in ("OMP_NUM_THREADS", "PYTHONPATH"):
        monkeypatch.setenv(name, environment[name])
    client = nbclient.NotebookClient(
        notebook, timeout=PATIENCE, resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    printed = "\n".join(
        output.get("text", "") + str(output.get("data", {}).get("text/markdown", ""))
        for cell in notebook.cells
        for output in cell.get("outputs", ())
    )
    plain, warm = (
        next(line for line in printed.splitlines() if line.startswith(f"| {name} |")).split("|")[2:]
        for name in ("plain", "with RFAConv, plain weights")
    )
    assert plain == warm
    assert float(plain[0]) > 0.05, "the plain detector has learned nothing to keep"
    picture = ROOT / "work_dirs" / "quickstart" / "attention" / "val_0000.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert os.path.getsize(ROOT / "work_dirs" / "quickstart" / "detector.onnx") > 10_000
