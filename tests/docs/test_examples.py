"""Examples in the pages: configs are built, sessions and programs run, commands name real files.

Code fenced as `python` is run, as `pycon` it is a session with its output; `py` is only parsed.
"""

import ast
import doctest
import logging
import re
import shlex
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS as DETECTORS
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import load_state_dict

from rfa_mmdet.models import RFAResNet
from tests.helpers.pages import PAGES, ROOT, code


def name(case: tuple[Path, str]) -> str:
    return case[0].relative_to(ROOT).as_posix()


CODE = code("python")
# That of the reference is a shipped one, over a file beside it; those of other packages are tested
# with them, in tests/configs.
ELSEWHERE = ('"../_base_', '"mmpretrain::', '"mmseg::', '"mmyolo::')
CONFIGS = [c for c in CODE if "_base_" in c[1] and not any(base in c[1] for base in ELSEWHERE)]
PROGRAMS = [case for case in CODE if re.match(r"import|from", case[1])]
COMMANDS = [case for case in code("bash") if case[0].name != "README.md"]


@pytest.mark.parametrize("case", CONFIGS, ids=name)
def test_config_is_built(case, tmp_path):
    file = tmp_path / "config.py"
    file.write_text(case[1])
    model = Config.fromfile(file).model
    init_default_scope("mmdet")
    changed = [part for part in ("backbone", "neck") if f"{part}=" in case[1]]
    assert changed
    for part in changed:
        net = DETECTORS.build(model[part])
        assert any("rfa_mmdet" in type(module).__module__ for module in net.modules())


@pytest.mark.parametrize("case", [c for c in CODE if c not in CONFIGS + PROGRAMS], ids=name)
def test_fragment_is_python(case):
    assert ast.parse(case[1]).body


@pytest.mark.parametrize("case", code("py"), ids=name)
def test_fragment_with_names_of_the_reader_is_python(case):
    assert ast.parse(case[1]).body


def test_programs_run():
    """In order: those of a page build on each other."""
    names: dict[Path, dict] = {}
    try:
        for page, text in PROGRAMS:
            if "timm" in text and find_spec("timm") is None:
                continue
            torch.manual_seed(0)
            exec(compile(text, str(page), "exec"), names.setdefault(page, {"__name__": page.stem}))
    finally:
        MODELS.module_dict.pop("LCT", None)  # which contributing.md registers
    assert "LCT" in names[ROOT / "docs" / "contributing.md"]


@pytest.mark.parametrize("page", dict.fromkeys(p for p, _ in code("pycon")), ids=lambda p: p.stem)
def test_session(page, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = "\n".join(text for found, text in code("pycon") if found == page)
    test = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    said: list[str] = []
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    doctest.DocTestRunner(optionflags=options).run(test, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("case", COMMANDS, ids=name)
def test_files_of_a_command_are_there(case):
    for word in shlex.split(case[1], comments=True):
        if word.startswith(("tools/", "configs/", "tests/", "benchmarks/")) and "*" not in word:
            assert all((ROOT / path).exists() for path in word.split()), word


def test_configs_that_the_text_names_are_there():
    for page in PAGES[1:]:
        for path in re.findall(r"`(configs/[\w./-]+)`", page.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{page}: {path}"


def test_report_of_a_warm_start():
    text = (ROOT / "docs" / "guides" / "pretrained-weights.md").read_text(encoding="utf-8")
    shown = re.search(r"(?s)```text\n(RFAResNet, loaded from a checkpoint:.*?)```", text)[1]
    plain = DETECTORS.build(dict(type="mmdet.ResNet", depth=18))
    net = RFAResNet(18, rfa=dict(type="RFAConv"), stage_with_rfa=(False, True, True, True))
    handler = logging.StreamHandler(StringIO())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    try:
        load_state_dict(net, plain.state_dict())
    finally:
        logger.removeHandler(handler)
    assert " ".join(shown.split()) in " ".join(handler.stream.getvalue().split())
