"""Options that take a number from a range."""

import sys
from argparse import ArgumentTypeError
from importlib import import_module

import pytest

from rfa_mmdet.cli.command_line import within

SCORE = "must be a number from 0.0 to 1.0"
COUNT = "must be an integer of at least 1"


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("ablate", ["c.py", "--jobs", "0"], COUNT),
        ("check_data", ["c.py", "--threads", "-1"], COUNT),
        ("complexity", ["c.py", "--image-size", "64", "0"], COUNT),
        ("demo", ["--epochs", "0"], COUNT),
        ("export_onnx", ["c.py", "c.pth", "--number", "two"], COUNT),
        ("make_shapes", ["root", "--train", "0"], "must be an integer from 1 to 1000000"),
        ("make_shapes", ["root", "--val", "2.5"], "must be an integer from 1 to 1000000"),
        ("make_shapes", ["root", "--size", "63"], "must be an integer from 64 to 4096"),
        ("make_shapes", ["root", "--max-objects", "21"], "must be an integer from 1 to 20"),
        (
            "make_shapes",
            ["root", "--seed", "-1"],
            f"must be an integer from 0 to {2**63 - 1}",
        ),
        ("predict", ["c.py", "c.pth", "x.jpg", "--batch-size", "0"], COUNT),
        ("predict", ["c.py", "c.pth", "x.jpg", "--score", "1.5"], SCORE),
        ("retrofit_checkpoint", ["c", "p", "o", "--tolerance", "nan"], "of at least 0.0"),
        ("visualize_attention", ["c.py", "c.pth", "x.jpg", "--score", "-0.1"], SCORE),
    ],
)
def test_an_invalid_number_is_named_with_the_valid_ones(
    tool, arguments, message, monkeypatch, capsys
):
    module = import_module(f"rfa_mmdet.cli.{tool}")
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        module.parse_args()
    option, value = arguments[-2:] if tool != "complexity" else (arguments[-3], arguments[-1])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert f"argument {option}: " in error
    assert f"{message}, got '{value}'" in error


def test_limits_are_included():
    assert within(1, 3)("1") == 1
    assert within(1, 3)("3") == 3
    assert within(0.0, 1.0)("1") == 1.0
    with pytest.raises(ArgumentTypeError, match="from 1 to 3, got '4'"):
        within(1, 3)("4")
