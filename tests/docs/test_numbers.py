"""Numbers in the pages that no script writes are those of the sources."""

import re

import pytest
from mmcv.cnn import build_plugin_layer

from rfa_mmdet.cli import doctor
from tests.helpers.pages import ROOT


def text_of(path: str) -> str:
    return " ".join((ROOT / path).read_text(encoding="utf-8").split())


def test_versions_of_the_install_page():
    (torch, _), _, (mmcv, _), (mmdet, _) = doctor.WANTED.values()
    python, newest = (".".join(map(str, version)) for version in doctor.PYTHONS)
    pinned = re.search(r"torch==(\d+\.\d+)", text_of("requirements/recent.txt"))[1]
    lowest = [".".join(map(str, version)) for version in (torch, mmcv, mmdet)]
    assert (
        f"Python {python} to {newest}, torch {lowest[0]} to {pinned}, mmcv {lowest[1]} to 2.1, "
        f"mmengine 0.10 and mmdet {lowest[2]} to 3.3"
    ) in text_of("docs/install.md")


def test_versions_of_triton():
    wanted = set(re.findall(r"triton==([\d.]+)", text_of("requirements/triton.txt")))
    wanted |= set(re.findall(r"triton==([\d.]+)", text_of("requirements/recent.txt")))
    sentence = re.search(r"compile with Triton (.*?\d)\. ", text_of("docs/install.md"))[1]
    assert set(re.findall(r"\d\.\d\.\d", sentence)) - {"2.1.0", "2.1.2"} == wanted


@pytest.mark.parametrize("page", ["docs/install.md", "docs/contributing.md"])
def test_minutes_of_make_gpu(page):
    minutes = re.search(r'"--minutes".*?default=(\d+)', text_of("benchmarks/gpu.py"))[1]
    assert f"within {minutes} minutes" in text_of(page)


def test_scales_of_the_plugins():
    arguments = {"ConAM": dict(patch_size=2, hidden_channels=4)}
    rows = re.findall(r"\| (`[^|]+`) \| ([\d/]+)", text_of("docs/guides/plugins.md"))
    found = {}
    for names, scale in rows:
        top, _, bottom = scale.partition("/")
        for name, more in re.findall(r"`(\w+)(?:\((\w+)=True\))?`", names):
            cfg = dict(type=name, start="identity", **arguments.get(name, {}))
            if more:
                cfg[more] = True
            plugin = build_plugin_layer(cfg, in_channels=32)[1]
            assert plugin.output_scale == int(top) / int(bottom or 1)
            found[name] = plugin
    assert len(rows) == 4
    assert len(found) == 6


def test_defaults_of_slurm():
    script = text_of("tools/slurm_train.sh")
    page = text_of("docs/guides/clusters.md")
    for name in ("GPUS", "CPUS_PER_TASK"):
        default = re.search(rf"\$\{{{name}:-(\d+)\}}", script)[1]
        assert f"| `{name}` | {default} |" in page
