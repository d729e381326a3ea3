"""tools/convert_checkpoint.py writes a file that loads strictly, and keeps everything else."""

import os
import pickle
import runpy
import shlex
import subprocess
import sys

import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from rfa_mmdet.checkpoints.convert import convert_checkpoint
from rfa_mmdet.errors import UserError
from rfa_mmdet.layers.warm_start.published_names import PUBLISHED
from tests.helpers.paths import ROOT
from tests.helpers.processes import PATIENCE
from tests.helpers.published import (
    THEIRS,
    Detector,
    assert_same,
    image,
    published_detector,
    randomise,
)

TOOL = "tools/convert_checkpoint.py"


def load(path):
    return CheckpointLoader.load_checkpoint(str(path), "cpu", logger="silent")


def saved(content, path):
    torch.save(content, path)
    return path


@pytest.fixture
def published(tmp_path):
    """Return a small file with one published layer."""
    return saved(THEIRS["CAMConv"](16, 4, 3).state_dict(), tmp_path / "published.pth")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the tool in this process; return its exit status, output and errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(ROOT / TOOL), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


# --------------------------------------------------------------------------- the whole tool


def test_converts_a_whole_training_checkpoint(tmp_path, monkeypatch):
    theirs = published_detector("RFCBAMConv")
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    rest = dict(
        meta=dict(epoch=3, classes=("circle", "square")),
        message_hub=dict(log_scalars={"train/loss": history}),
        optimizer=dict(state={0: dict(step=torch.tensor(5.0))}, param_groups=[dict(lr=0.1)]),
    )
    source = saved(dict(state_dict=theirs.state_dict(), **rest), tmp_path / "in.pth")
    before = source.read_bytes()

    done = subprocess.run(
        [sys.executable, str(ROOT / TOOL), "in.pth", "new/out.pth"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        text=True,
        capture_output=True,
        timeout=PATIENCE,
    )

    assert done.returncode == 0, done.stderr
    assert source.read_bytes() == before
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["out.pth"]
    converted = load(tmp_path / "new" / "out.pth")
    assert list(converted) == ["state_dict", *rest]
    assert converted["meta"] == rest["meta"]
    assert converted["optimizer"] == rest["optimizer"]
    loss = converted["message_hub"]["log_scalars"]["train/loss"]
    assert loss.data[0].tolist() == history.data[0].tolist()

    # Loads strictly without renaming.
    monkeypatch.setattr("rfa_mmdet.layers.warm_start.start.rename_published", lambda *args: 0)
    detector = randomise(Detector("RFCBAMConv"), 4)
    detector.load_state_dict(converted["state_dict"], strict=True)
    assert_same(detector(image()), theirs(image()))

    published, ours = theirs.state_dict(), converted["state_dict"]
    plugins = [k for k in published if ".ema" in k or ".conam" in k]
    assert len(plugins) == 4 * (6 + 4)
    kept = [k for k in published if k in ours]
    assert set(plugins) < set(kept)
    assert all(torch.equal(published[k], ours[k]) for k in kept)

    # feature, norm (5), spatial, conv (2); the two of se.fc already have our names
    for layer in ("layer1.0", "layer1.1", "layer2.0", "layer2.1"):
        row = next(line for line in done.stdout.splitlines() if f"backbone.{layer}.conv1" in line)
        assert [cell.strip() for cell in row.split("│")[1:-1]] == [
            f"backbone.{layer}.conv1",
            "RFCBAMConv",
            "9",
        ]
    assert f"renamed 36 keys, kept {len(published) - 36}\n" in done.stdout
    assert "wrote: new/out.pth" in done.stdout
    assert "not to resume" in done.stderr


def test_example_of_the_help_works(run, published, tmp_path, monkeypatch):
    code, out, _ = run("--help")
    assert code == 0
    python, tool, *arguments = shlex.split(out.split("example:\n")[1])
    assert (python, tool) == ("python", TOOL)
    monkeypatch.chdir(tmp_path)
    assert run(*arguments)[0] == 0
    assert (tmp_path / "converted.pth").is_file()


# --------------------------------------------------------------------------- what is in the file


@pytest.mark.parametrize("system", PUBLISHED)
@pytest.mark.parametrize("nested", ["state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["", "module.layer1.0.conv1."])
def test_every_layer_and_file_structure(system, nested, prefix, tmp_path):
    theirs = randomise(THEIRS[system](32, 8, 3)).state_dict()
    state = {prefix + key: value for key, value in theirs.items()}
    source = saved({nested: state, "epoch": 1} if nested else state, tmp_path / "in.pth")
    conversion = convert_checkpoint(source, tmp_path / "out.pth")
    assert [(layer.prefix, layer.system) for layer in conversion.layers] == [(prefix, system)]
    converted = load(tmp_path / "out.pth")
    if nested:
        assert list(converted) == [nested, "epoch"]
        assert converted["epoch"] == 1
        converted = converted[nested]
    expected = {prefix + PUBLISHED[system][key]: value for key, value in theirs.items()}
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], value) for key, value in expected.items())
    renamed = sum(layer.renamed for layer in conversion.layers)
    assert renamed == len(expected.keys() - state.keys())
    assert conversion.kept == len(expected) - renamed
    assert any("under 'model'" in w for w in conversion.warnings) == (nested == "model")


def test_several_kinds_of_layers_in_one_file(run, tmp_path):
    layers = nn.ModuleDict({name: THEIRS[name](32, 8, 3) for name in THEIRS})
    layers["plain"] = nn.Conv2d(3, 3, 1)
    source = saved(layers.state_dict(), tmp_path / "in.pth")
    conversion = convert_checkpoint(source, tmp_path / "out.pth")
    assert {layer.prefix: layer.system for layer in conversion.layers} == {
        f"{name}.": name for name in THEIRS
    }
    assert conversion.kept == 2 + 2  # the plain one's, and se.fc


def test_single_layer_file(run, published, tmp_path):
    code, out, err = run(published, tmp_path / "out.pth")
    assert (code, err) == (0, "")
    assert "(the whole file)" in out
    assert "renamed 4 keys, kept 0\n" in out


def test_long_and_odd_prefixes_are_shown_whole(run, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    prefix = "[red]" + ".".join(["backbone"] * 10) + ".last."
    state = {prefix + k: v for k, v in THEIRS["CAMConv"](16, 4, 3).state_dict().items()}
    code, out, _ = run(saved(state, tmp_path / "in.pth"), tmp_path / "out.pth")
    assert code == 0
    cells = [line.split("│")[1].strip() for line in out.splitlines() if line.count("│") == 4]
    assert "".join(cells) == prefix.removesuffix(".")


# --------------------------------------------------------------------------- errors


def test_error_without_published_layers_lists_the_expected_names(run, tmp_path):
    source = saved(nn.Conv2d(3, 3, 1).state_dict(), tmp_path / "in.pth")
    code, out, err = run(source, tmp_path / "out.pth")
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {source}: no layer with published names found. A layer")
    for system in PUBLISHED:
        assert f"  {system}: " in err
    assert "spatital.weight" in err
    assert not (tmp_path / "out.pth").exists()


def test_converting_twice_finds_nothing(run, published, tmp_path):
    assert run(published, tmp_path / "out.pth")[0] == 0
    code, _, err = run(tmp_path / "out.pth", tmp_path / "again.pth")
    assert code == 1
    assert "no layer with published names" in err


def test_existing_file_is_kept_without_overwrite(run, published, tmp_path):
    target = tmp_path / "out.pth"
    target.write_text("mine")
    code, _, err = run(published, target)
    assert (code, err) == (1, f"error: {target}: already exists; use --overwrite to replace it\n")
    assert target.read_text() == "mine"
    assert run(published, target, "--overwrite")[0] == 0
    assert "attention.mlp.0.weight" in load(target)


def test_in_place(run, published):
    assert run(published, published)[0] == 1
    assert run(published, published, "--overwrite")[0] == 0
    assert "attention.mlp.0.weight" in load(published)


def test_failed_conversion_keeps_the_old_file(run, tmp_path):
    target = tmp_path / "out.pth"
    target.write_text("mine")
    assert run(tmp_path / "missing.pth", target, "--overwrite")[0] == 1
    source = saved(dict(weight=torch.ones(1)), tmp_path / "in.pth")
    assert run(source, target, "--overwrite")[0] == 1
    assert target.read_text() == "mine"


def test_failed_write_leaves_no_file(published, tmp_path, monkeypatch):
    def full(content, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(UserError, match=r"cannot be written: .*No space left"):
        convert_checkpoint(published, tmp_path / "out.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["published.pth"]


class Hostile:
    def __reduce__(self):
        return os.system, ("echo run",)


def broken(path):
    path.write_bytes(saved(THEIRS["CAMConv"](16, 4, 3).state_dict(), path).read_bytes()[:-400])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "in.pth: no such file\n"),
        (lambda path: path.mkdir(), "no such file"),
        (lambda path: path.write_bytes(b""), "truncated or not a checkpoint"),
        (lambda path: path.write_text("no checkpoint"), "truncated or not a checkpoint"),
        (broken, "truncated or not a checkpoint"),
        (lambda path: saved(dict(model=Hostile()), path), "posix.system; no code from it was run"),
        (lambda path: path.write_bytes(pickle.dumps(Hostile())), "not loaded|no checkpoint"),
        (lambda path: saved([torch.ones(1)], path), "contains a list, not a dict"),
        (lambda path: saved({}, path), "no layer with published names"),
        (lambda path: saved({0: torch.ones(1)}, path), "its state dict has the key 0"),
        (lambda path: saved(dict(state_dict=[1]), path), "its state_dict is a list, not a"),
    ],
    ids=[
        *("missing", "folder", "empty", "text", "cut", "unsafe", "unsafe-pickle"),
        *("list", "nothing", "numbers", "no-dict"),
    ],
)
def test_unconvertible_files(run, write, message, tmp_path):
    source = tmp_path / "in.pth"
    write(source)
    code, out, err = run(source, tmp_path / "out.pth")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    assert str(source) in err
    assert any(part in err for part in message.split("|"))
    assert not (tmp_path / "out.pth").exists()
    assert not list(tmp_path.glob("*.part"))


def test_unwritable_targets(run, published, tmp_path):
    code, _, err = run(published, tmp_path, "--overwrite")
    assert code == 1
    assert "is a folder; name the file to write" in err
    (tmp_path / "file").write_text("")
    code, _, err = run(published, tmp_path / "file" / "out.pth")
    assert code == 1
    assert err.startswith(f"error: {tmp_path / 'file' / 'out.pth'}: cannot be written")
