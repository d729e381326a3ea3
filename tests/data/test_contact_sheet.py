"""The contact sheet of the worst images, with any names and pixels."""

import csv
from collections import Counter

import cv2
import numpy as np
import pytest

from rfa_mmdet.cli.check_data import print_tables, write_list
from rfa_mmdet.data.check.audit import Annotated, Audit, Box, Problem
from rfa_mmdet.data.check.contact_sheet import save_contact_sheet

NAMES = ("$a$b_$.png", "[red]x.png", "new\nline.png", "猫 \udcff.png", "=1+1.png")


@pytest.mark.filterwarnings("error")
def test_names_with_any_characters(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = Audit(images=dict(train=len(NAMES)), boxes=dict(train=Counter()))
    for i, name in enumerate(NAMES):
        pixels = np.full((40, 60, 3), 2**16 - 1 if i % 2 else 90, np.uint16 if i % 2 else np.uint8)
        with open(name, "wb") as file:
            file.write(cv2.imencode(".png", pixels)[1].tobytes())
        box = Box(name, (5.0, 5.0, 70.0, 30.0))
        text = f"box outside: {name} $x_$"
        found.problems.append(Problem("box outside", "train", name, text, box=box))
        found.annotations[name] = Annotated(name, (60, 40), (box,))
        found.boxes["train"][name] = 1
    out = save_contact_sheet(found, tmp_path / "worst.png")
    picture = cv2.imread(str(out))
    assert picture.shape[0] > 300
    assert picture.std() > 10
    write_list(found, tmp_path / "problems.csv")
    with open("problems.csv", newline="", encoding="utf-8") as file:
        cells = [row["image"] for row in csv.DictReader(file)]
    assert cells[-1] == "'=1+1.png"
    assert cells[:3] == list(NAMES[:3])
    print_tables(found)
    printed = capsys.readouterr().out
    for shown in ("$a$b_$.png", "[red]x.png", r"new\nline.png", r"猫 \udcff.png", "=1+1.png"):
        assert shown in printed
