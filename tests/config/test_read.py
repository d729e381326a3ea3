"""Reading a config without a command line."""

import pytest

from rfa_mmdet.config.read import load_config
from rfa_mmdet.errors import ConfigError

CONFIG = "work_dir = {work_dir!r}\ndefault_scope = 'mmdet'\ntrain_cfg = dict(max_epochs=1)\n"


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "some.py"
        path.write_text(text)
        return path

    return write


def test_options_lie_over_the_file(config):
    cfg = load_config(
        config(CONFIG.format(work_dir=None)),
        {"train_cfg.max_epochs": 3, "train_cfg.val_interval": 2},
    )
    assert cfg.train_cfg == dict(max_epochs=3, val_interval=2)
    assert cfg.launcher == "none"


@pytest.mark.parametrize(
    ("stands", "given", "expected"),
    [(None, None, "work_dirs/some"), ("a", None, "a"), ("a", "b", "b"), (None, "b", "b")],
)
def test_where_a_run_writes(config, stands, given, expected):
    path = config(CONFIG.format(work_dir=stands))
    assert load_config(path, work_dir=given, launcher="pytorch").work_dir == expected


def test_what_no_run_reads_is_named(config):
    with pytest.raises(ConfigError, match=r"train_cgf\.x=\.\.\.: no run reads .*nearest: train_cf"):
        load_config(config(CONFIG.format(work_dir=None)), {"train_cgf.x": 1})
    path = config("root = 'data/x'\ntrain_dataloader = dict(dataset=dict(data_root=root))\n")
    with pytest.raises(ConfigError, match=r"such as train_dataloader\.dataset\.data_root$"):
        load_config(path, {"root": "data/y"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = (", "never closed"),
        ("_base_ = 'none.py'", r"none\.py"),
        ("custom_imports = dict(imports=['no_such_module'])", "no_such_module"),
    ],
)
def test_files_that_do_not_parse(config, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config(text))
