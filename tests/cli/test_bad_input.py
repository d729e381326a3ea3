"""Every kind of bad input gives one error in tools/train.py or tools/test.py, before training."""

import json
import logging
import re
import runpy
import shutil
import sys

import pytest

from tests.helpers.paths import ROOT


@pytest.fixture
def fails(capsys, monkeypatch, shapes, tiny_config, tmp_path):
    """Run a tool in this process; return what it printed as its error."""

    def run(*arguments, tool="train", config=tiny_config, data=shapes, work_dir=tmp_path):
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("DATA_ROOT", str(data))
        # MMEngine's logger may have kept the stream of an earlier test, which is closed.
        monkeypatch.setattr(logging, "raiseExceptions", False)
        argv = [f"tools/{tool}.py", str(config), *map(str, arguments), "--work-dir", str(work_dir)]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(f"tools/{tool}.py", run_name="__main__")
        assert stop.value.code == 1
        errors = capsys.readouterr().err
        assert errors.count("error: ") == 1
        assert "Epoch(train)" not in errors
        return errors[errors.index("error: ") :]

    return run


@pytest.fixture
def damaged(shapes, tmp_path):
    """Return a copy of the dataset to damage."""
    return shutil.copytree(shapes, tmp_path / "data")


def with_model(tiny_config, tmp_path, text):
    path = tmp_path / "changed.py"
    path.write_text(f'_base_ = "{tiny_config}"\n{text}\n')
    return path


def test_missing_config(fails):
    error = fails(config="configs/rfaconv/retinanet_r50-rfaconv_fpn_1x_coc.py")
    assert "no such file; did you mean retinanet_r50-rfaconv_fpn_1x_coco.py" in error


def test_traceback_on_request(run_tool, tiny_config, tmp_path):
    config = with_model(tiny_config, tmp_path, "model = None")
    done = run_tool(sys.executable, "tools/train.py", config, RFA_MMDET_TRACEBACK="1")
    assert done.returncode == 1
    assert "Traceback (most recent call last):" in done.stdout
    assert re.match(r"error: .* has no model", done.stdout.splitlines()[-1])


def test_wrong_type(fails):
    error = fails("--cfg-options", "model.backbone.rfa.type=RFACov")
    assert "model.backbone.rfa.type='RFACov' is not registered; did you mean RFAConv" in error


def test_missing_custom_imports(fails, tiny_config, tmp_path):
    config = with_model(tiny_config, tmp_path, "custom_imports = dict(_delete_=True, imports=[])")
    error = fails(config=config)
    assert "model.backbone.type='RFAResNet' belongs to rfa_mmdet" in error
    assert "add custom_imports = dict(imports=['rfa_mmdet'])" in error


def test_failing_custom_imports(fails, tiny_config, tmp_path):
    config = with_model(
        tiny_config, tmp_path, 'custom_imports = dict(imports=["rfa_mmdet", "no_such_module"])'
    )
    assert "no_such_module" in fails(config=config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["data_root=elsewhere"], "data_root is a variable of the config file"),
        (["train_cgf.max_epochs=1"], "unknown config key 'train_cgf'; did you mean train_cfg"),
    ],
)
def test_options_without_effect(fails, options, message):
    assert message in fails("--cfg-options", *options)


def test_head_with_wrong_num_classes(fails):
    error = fails("--cfg-options", "model.bbox_head.num_classes=80")
    assert "model.bbox_head.num_classes=80" in error
    assert "model.bbox_head.num_classes=4" in error


def test_classes_missing_in_the_annotations(fails, tiny_config, tmp_path):
    config = with_model(
        tiny_config,
        tmp_path,
        'dataset = dict(metainfo=dict(classes=("circle", "square", "triangle", "hexagon")))\n'
        "train_dataloader = dict(dataset=dataset)\nval_dataloader = dict(dataset=dataset)",
    )
    error = fails(config=config)
    assert "hexagon" in error
    assert "star" in error


def test_missing_annotation_file(fails, damaged):
    (damaged / "annotations" / "train.json").unlink()
    error = fails(data=damaged)
    assert str(damaged / "annotations" / "train.json") in error


def test_truncated_annotation_file(fails, damaged):
    path = damaged / "annotations" / "val.json"
    path.write_text(path.read_text()[:-100])
    error = fails(data=damaged)
    assert str(path) in error


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_image(fails, damaged, damage):
    name = json.loads((damaged / "annotations" / "train.json").read_text())["images"][3]
    path = damaged / "JPEGImages" / name["file_name"]
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    error = fails(data=damaged)
    assert path.name in error
    assert damage in error


PLUGIN = "model = dict(backbone=dict(plugins=[dict(cfg=dict({cfg}), position='after_conv1')]))"


def test_ema_factor_must_divide_the_channels(fails, tiny_config, tmp_path):
    config = with_model(tiny_config, tmp_path, PLUGIN.format(cfg="type='EMA', factor=3"))
    error = fails(config=config)
    assert "factor=3: must divide in_channels=8; valid: 1, 2, 4, 8" in error


def test_even_kernel_without_padding():
    # MMDetection always passes padding, so this only happens when building the layer directly.
    from mmcv.cnn import build_conv_layer

    with pytest.raises(ValueError, match=r"padding=None with the even kernel_size=\(4, 4\)"):
        build_conv_layer(dict(type="RFAConv"), 8, 8, 4)


def test_amp_without_cuda(fails):
    assert "mixed precision in MMEngine needs CUDA" in fails("--amp")


def test_auto_scale_lr_without_base(fails, tiny_config, tmp_path):
    config = with_model(tiny_config, tmp_path, "auto_scale_lr = dict(_delete_=True)")
    assert "auto_scale_lr = dict(base_batch_size=16)" in fails("--auto-scale-lr", config=config)


def test_resume_from_a_missing_file(fails):
    assert "--resume nowhere.pth: no such file" in fails("--resume", "nowhere.pth")


@pytest.mark.parametrize("name", ["", "{work_dir}/epoch_3.pth"])
def test_resume_with_a_dangling_last_checkpoint(fails, tmp_path, name):
    name = name.format(work_dir=tmp_path)
    (tmp_path / "last_checkpoint").write_text(name)
    for file in ("epoch_1.pth", "epoch_2.pth", ".epoch_3.17.part.pth"):
        (tmp_path / file).touch()
    error = fails("--resume")
    assert f"last_checkpoint names {name!r}, which does not exist; pass another" in error
    assert error.strip().endswith(": epoch_1.pth, epoch_2.pth)")


def test_missing_or_invalid_checkpoint(fails, tmp_path):
    missing = tmp_path / "nowhere.pth"
    assert f"checkpoint={str(missing)!r}: no such file" in fails(missing, tool="test")
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"PK\x03\x04 and then nothing")
    assert str(broken) in fails(broken, tool="test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim_wrapper = dict(optimizer=dict(lrr=1))", "unexpected keyword argument 'lrr'"),
        ("param_scheduler = [dict(type='MultiStepLR', mile=1)]", "argument 'mile'"),
        ("val_evaluator = dict(metric='bbx')", "metric should be one of"),
        ("val_evaluator = dict(metric=['segm'])", "has no mask head"),
        ("val_cfg = None", "but no val_cfg"),
        ("load_from = 'no_such.pth'", "load_from='no_such.pth': no such file"),
        ("load_from = 'http://127.0.0.1:9/a.pth'", "cannot be downloaded"),
        ("data = dict(samples_per_gpu=2)\nmodel = None", "has no model"),
        (
            "model = dict(backbone=dict(init_cfg=dict("
            "_delete_=True, type='Pretrained', checkpoint='torchvision://resnet5')))",
            "init_cfg.checkpoint='torchvision://resnet5': no such weights; did you mean torchvision://",
        ),
    ],
)
def test_invalid_configs(fails, tiny_config, tmp_path, text, message):
    assert message in fails(config=with_model(tiny_config, tmp_path, text))


@pytest.mark.parametrize(
    ("place", "message"),
    [("file", "not a folder"), ("file/x", "not a folder"), ("/proc/x", "cannot")],
)
@pytest.mark.parametrize("tool", ["train", "test"])
def test_unwritable_work_dir(fails, tmp_path, place, message, tool):
    (tmp_path / "file").touch()
    checkpoint = [tmp_path / "file"] if tool == "test" else []
    error = fails(*checkpoint, tool=tool, work_dir=tmp_path / place)
    assert message in error
    assert len(error.splitlines()) == 1


def test_checkpoint_of_another_model(fails, checkpoint, tiny_config, tmp_path):
    config = with_model(tiny_config, tmp_path, "model = dict(backbone=dict(depth=34))")
    error = fails(checkpoint, tool="test", config=config)
    assert "does not fit the config's model: " in error
    assert "parameters are missing in the checkpoint, e.g. backbone.layer" in error


def test_out_must_be_a_pickle(fails, tmp_path):
    some = tmp_path / "some.pth"
    some.touch()
    assert "must end in .pkl" in fails(some, "--out", "x.json", tool="test")


def test_unwritable_out(fails, tmp_path):
    some = tmp_path / "some.pth"
    some.touch()
    error = fails(some, "--out", some / "x" / "y.pkl", tool="test")
    assert error.strip() == f"error: --out={some}/x: {some} is not a folder"
    (tmp_path / "folder.pkl").mkdir()
    assert "is a folder" in fails(some, "--out", tmp_path / "folder.pkl", tool="test")


def test_launcher_that_did_not_start_the_process(fails, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert "--launcher pytorch: RANK" in fails("--launcher", "pytorch")
