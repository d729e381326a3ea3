"""The demo, whole."""

import sys

import cv2
import pytest

from tests.helpers.paths import ROOT


@pytest.mark.slow
def test_demo(run_tool):
    done = run_tool("env", "-u", "DATA_ROOT", sys.executable, "tools/demo.py")
    # It fails by itself where AP50 stays below 0.90.
    assert done.returncode == 0, done.stdout[-5000:]
    assert "AP50" in done.stdout
    assert "next, try" in done.stdout
    for name in ("detections.png", "curves.png", "attention.png"):
        picture = cv2.imread(str(ROOT / "work_dirs" / "demo" / name))
        assert picture is not None
        assert picture.std() > 10
