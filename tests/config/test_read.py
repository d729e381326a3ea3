"""Reading configs without a command line."""

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


def test_options_override_the_file(config):
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
def test_default_work_dir(config, stands, given, expected):
    path = config(CONFIG.format(work_dir=stands))
    assert load_config(path, work_dir=given, launcher="pytorch").work_dir == expected


def test_unknown_config_keys_raise(config):
    with pytest.raises(
        ConfigError, match=r"train_cgf\.x=\.\.\.: unknown config key .*did you mean train_cf"
    ):
        load_config(config(CONFIG.format(work_dir=None)), {"train_cgf.x": 1})
    path = config("root = 'data/x'\ntrain_dataloader = dict(dataset=dict(data_root=root))\n")
    with pytest.raises(ConfigError, match=r"e\.g\. train_dataloader\.dataset\.data_root$"):
        load_config(path, {"root": "data/y"})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("some.py", "a = (", r"line 1: SyntaxError: .*never closed"),
        ("some.py", "a = 1\nb = c", r"line 2: NameError: name 'c'"),
        ("some.py", "a = 1\n\x00", "null byte|source code"),
        ("some.py", "_base_ = 'none.py'", r"none\.py"),
        ("some.py", "_base_ = 'wrong.py'", r"wrong\.py: line 1: NameError"),
        ("some.py", "_base_ = 'some.py'", r"bases form a cycle: some\.py"),
        (
            "some.py",
            "custom_imports = dict(imports=['no_such_module'])",
            "imports: .*no_such_module",
        ),
        ("some.py", "custom_imports = 'no_such_module'", "custom_imports must be a dict"),
        ("some.py", "from mmdet.models import NoSuch\nmodel = dict(type=NoSuch)", "import NoSuch"),
        ("some.json", '{"a": ', "JSONDecodeError"),
        ("some.yaml", "a: [1", "ParserError"),
        ("some.json", "[1]", "must contain a dict"),
        ("some.txt", "a = 1", r"must end in \.py, \.json"),
        ("some.py/x", "", "is a folder, not a config"),
    ],
)
def test_unparsable_files(tmp_path, name, text, message):
    (tmp_path / "wrong.py").write_text("a = b")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path = tmp_path / "some.py" if name.endswith("/x") else path
    with pytest.raises(ConfigError, match=message) as error:
        load_config(path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", '{"train_cfg": {"max_epochs": 2}}'), ("a.yml", "train_cfg: {}")]
)
def test_json_and_yaml(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert "train_cfg" in load_config(tmp_path / name)


def test_configs_of_packages():
    cfg = load_config("mmdet::retinanet/retinanet_r18_fpn_1x_coco.py")
    assert cfg.model.backbone.depth == 18
    assert cfg.work_dir == "work_dirs/retinanet_r18_fpn_1x_coco"
    with pytest.raises(ConfigError, match=r"did you mean retinanet_r18_fpn_1x_coco\.py"):
        load_config("mmdet::retinanet/retinanet_r18_fpn_1x_coc.py")
    with pytest.raises(ConfigError, match="package 'no_such' is not installed"):
        load_config("no_such::retinanet/retinanet_r18_fpn_1x_coco.py")


def test_none_means_absent(config):
    keys = "custom_hooks custom_imports visualizer val_dataloader auto_scale_lr env_cfg randomness"
    hooks = "default_hooks = dict(visualization=None, logger=None)"
    cfg = load_config(config("\n".join([*(f"{key} = None" for key in keys.split()), hooks])))
    assert not cfg.keys() & {*keys.split()}
    assert cfg.default_hooks == dict(logger=None)  # removes MMEngine's own hook


def test_default_scope_of_pure_python_configs_stays_none(config):
    text = "from mmdet.models import ResNet\nmodel = dict(type=ResNet)\ndefault_scope = None"
    cfg = load_config(config(text))
    assert cfg.default_scope is None
    assert cfg.model.type.__name__ == "ResNet"
