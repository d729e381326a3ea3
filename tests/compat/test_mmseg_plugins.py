"""Two plug-ins at one place of MMSegmentation's ResNet: the second gets what the first returns."""

import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

pytest.importorskip("mmseg.models", reason="mmseg is not installed", exc_type=ImportError)
pytestmark = pytest.mark.slow

# Prints whether the first of the two plug-ins counts, in a separate process.
RUN = """
import rfa_mmdet
import torch
from mmseg.models.backbones import ResNet
plugins = [
    dict(cfg=dict(type="SE"), stages=(True, False, False, False), position="after_conv3"),
    dict(cfg=dict(type="ECA"), stages=(True, False, False, False), position="after_conv3"),
]
net = ResNet(50, plugins=plugins)
net.eval()  # returns None
block = net.layer1[0]
x = torch.rand(1, 256, 8, 8)
y = block.forward_plugin(x, block.after_conv3_plugin_names)
first, second = (getattr(block, name) for name in block.after_conv3_plugin_names)
print(torch.equal(y, second(first(x))), torch.equal(y, second(x)))
"""


@pytest.mark.parametrize(
    ("choice", "expected"), [("", "True False"), ("-mmseg_plugins", "False True")]
)
def test_plugins_are_chained(choice, expected, monkeypatch):
    monkeypatch.setenv("RFA_MMDET_COMPAT", choice)
    command = [sys.executable, "-W", "ignore", "-c", RUN]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected
