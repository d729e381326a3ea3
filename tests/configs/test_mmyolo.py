"""configs/mmyolo, with MMYOLO itself; run with  make test-mmyolo."""

import copy
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.hub import get_config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from rfa_mmdet.analysis.complexity import detector_complexity
from rfa_mmdet.checkpoints.retrofit import compare
from rfa_mmdet.config.check import check_config
from rfa_mmdet.config.plain import plain_base
from rfa_mmdet.data.shapes import make_shapes
from rfa_mmdet.inference.detector import Detector
from rfa_mmdet.layers import EMA, RFAConv
from rfa_mmdet.models.retrofit.new_layers import new_layers
from tests.helpers.norms import randomise_norms
from tests.helpers.paths import ROOT
from tests.helpers.sets import SPLIT_KEYS, draw_sets, leaves
from tests.helpers.shipped import nodes, unscoped

if find_spec("mmyolo") is None:
    pytest.skip("MMYOLO is not installed: make test-mmyolo", allow_module_level=True)

pytestmark = pytest.mark.slow

FOLDER = ROOT / "configs" / "mmyolo"
# Name without the method -> MMYOLO's config.
BASES = {
    "yolov5_n-v61_syncbn_fast_8xb16-300e_coco": "yolov5",
    "yolov5_s-v61_syncbn_fast_8xb16-300e_coco": "yolov5",
    "yolov8_n_syncbn_fast_8xb16-500e_coco": "yolov8",
}
RFA_PLACES = [
    *(f"backbone.stage{stage}.0.conv" for stage in (1, 2, 3, 4)),
    *(f"neck.downsample_layers.{level}.conv" for level in (0, 1)),
]
EMA_PLACES = ["backbone.stage3.1.ema", "backbone.stage4.1.ema"]
CONFIGS = sorted(FOLDER.glob("*.py"))
WITH_RFA = [path for path in CONFIGS if "-rfaconv_" in path.name]
WITH_EMA = [path for path in CONFIGS if "-ema_" in path.name]

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope("mmyolo")


def base_of(path: Path) -> Config:
    name = re.sub("-(rfaconv|ema)_", "_", path.stem)
    return get_config(f"mmyolo::{BASES[name]}/{name}.py")


def build(cfg: Config, device: str = "cpu") -> nn.Module:
    with torch.device(device):
        return MODELS.build(copy.deepcopy(cfg.model))


def parameters(cfg: Config) -> int:
    return sum(p.numel() for p in build(cfg, "meta").parameters())


def trained_plain(cfg: Config) -> nn.Module:
    """Return the detector without our layers, as if it was trained."""
    torch.manual_seed(2)
    plain = build(plain_base(cfg))
    plain.init_weights()
    return randomise_norms(plain)


def start_as_identity(cfg: Config) -> Config:
    for part in nodes(cfg._cfg_dict):
        if part.get("type") == "EMA":
            part["start"] = "identity"
    return cfg


# --- what the configs are ------------------------------------------------------------------------


def test_all_promised_configs_are_shipped():
    methods = ("rfaconv", "ema")
    wanted = {base.replace("_syncbn", f"-{m}_syncbn") for base in BASES for m in methods}
    assert {path.stem for path in CONFIGS} == wanted


@each_config
def test_only_the_new_layers_differ_from_the_base(path):
    cfg, base = Config.fromfile(path), base_of(path)
    check_config(Config({**cfg, "launcher": "none"}))
    own, theirs = unscoped(cfg.to_dict()), unscoped(base.to_dict())
    for part in ("backbone", "neck"):
        if own["model"][part]["type"] == "mmdet.Retrofit":
            assert set(own["model"][part]) == {"type", "module", "edits"}
            own["model"][part] = own["model"][part]["module"]
    assert own.pop("custom_imports") == dict(imports=["rfa_mmdet"])
    hooks = [dict(type="EpochSeedHook"), dict(type="SyncBuffersHook")]
    assert own.pop("custom_hooks") == theirs.pop("custom_hooks") + hooks
    own.pop("rfa", None)
    assert own == theirs


@each_config
def test_places_of_the_new_layers(path):
    model, plain = build(Config.fromfile(path), "meta"), build(base_of(path), "meta")
    assert type(model.backbone) is type(plain.backbone)
    found = dict(new_layers(model))
    if path in WITH_EMA:
        assert list(found) == EMA_PLACES
        assert all(type(layer) is EMA and layer.start == "paper" for layer in found.values())
        assert type(model.backbone.stage4[2]).__name__ == "SPPFBottleneck"  # after the last one
        return
    assert list(found) == RFA_PLACES
    assert all(type(layer) is RFAConv for layer in found.values())
    halving = [
        name
        for name, conv in plain.named_modules()
        if isinstance(conv, nn.Conv2d) and conv.stride == (2, 2)
    ]
    assert halving == ["backbone.stem.conv", *RFA_PLACES]


def test_ten_lines_of_the_documentation_build_the_shipped_detector(tmp_path):
    page = (ROOT / "docs" / "other-tasks.md").read_text()
    (text,) = re.findall(r'(?ms)^```python\n(_base_ = "mmyolo::.*?)^```$', page)
    assert len(text.splitlines()) == 10
    (tmp_path / "config.py").write_text(text)
    (path,) = [path for path in WITH_RFA if "yolov8_n" in path.name]
    own, shipped = (Config.fromfile(file) for file in (tmp_path / "config.py", path))
    assert own.train_dataloader == shipped.train_dataloader
    # repr has the arguments of every layer
    assert repr(build(own, "meta")) == repr(build(shipped, "meta"))


# --- sizes ---------------------------------------------------------------------------------------


def test_ema_on_yolov5s_has_the_papers_parameters():
    (path,) = [path for path in WITH_EMA if "yolov5_s" in path.name]
    plain, more = parameters(base_of(path)), parameters(Config.fromfile(path))
    assert (plain, more) == (7_235_389, 7_238_685)
    # "7.23M" and "7.24M": the plain one is cut off, not rounded.
    assert (int(plain / 1e4) / 100, round(more / 1e6, 2)) == (7.23, 7.24)


def test_rfaconv_on_yolov8n_has_the_papers_size():
    (path,) = [path for path in WITH_RFA if "yolov8_n" in path.name]
    found = detector_complexity(Config.fromfile(path), (640, 640))
    # "3.2" and "9.0", which counts a multiply-add twice.
    assert (round(found.parameters / 1e6, 1), round(2 * found.gflops, 1)) == (3.2, 9.0)


def test_rfaconv_on_yolov5n_has_the_papers_parameters_for_voc():
    (path,) = [path for path in WITH_RFA if "yolov5_n" in path.name]
    cfg = Config.fromfile(path)
    cfg.model.bbox_head.head_module.num_classes = 20
    assert round(parameters(cfg) / 1e6, 1) == 1.8


def test_readme_has_the_models_sizes():
    text = (FOLDER / "README.md").read_text()
    rows = dict(
        re.findall(r"(?m)^\| \[(\S+)\]\(\1\.py\) \| COCO \| (.+) \| not measured \|$", text)
    )
    assert set(rows) == {path.stem for path in CONFIGS}
    for path in CONFIGS:
        found = detector_complexity(Config.fromfile(path), (640, 640))
        assert found.uncounted == {}
        assert rows[path.stem] == f"{found.parameters:,} | {found.gflops:.3f}"


# --- beginnings: MMYOLO's init_weights resets every Conv2d ---------------------------------------


def test_mmyolo_resets_every_convolution():
    model = build(Config.fromfile(WITH_RFA[0]))
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.init_weights()
    for name in ("stem.conv.weight", "stage1.0.conv.conv.weight", "stage1.1.main_conv.conv.weight"):
        assert not torch.equal(model.backbone.get_parameter(name), before[f"backbone.{name}"])


@pytest.mark.parametrize("path", WITH_RFA, ids=lambda path: path.stem)
def test_attention_begins_as_torch_does(path):
    model = build(Config.fromfile(path))
    model.init_weights()
    for _, layer in new_layers(model):
        # Uniform, with a bound from the fan of one group; Kaiming's of all groups is far smaller.
        for conv, fan in ((layer.feature, 9), (layer.attention, 1)):
            assert 0.9 * fan**-0.5 < conv.weight.abs().max() <= fan**-0.5


@pytest.mark.parametrize("path", WITH_RFA, ids=lambda path: path.stem)
def test_plain_checkpoint_gives_its_outputs_after_the_reset(path):
    cfg = Config.fromfile(path)
    plain, net = trained_plain(cfg), build(cfg)
    net.init_weights()
    load_state_dict(net, plain.state_dict(), strict=True)
    assert all(layer.start.plain for _, layer in new_layers(net))
    found = compare(plain, net, 255 * torch.rand(3, 128, 160))
    assert found.outputs.keys() == {"maps", "bbox_head"}
    assert found.largest <= 1e-4


@pytest.mark.parametrize("path", WITH_EMA, ids=lambda path: path.stem)
def test_identity_comes_after_the_reset(path):
    cfg = start_as_identity(Config.fromfile(path))
    plain, net = trained_plain(cfg), build(cfg)
    net.init_weights()
    assert all(layer.is_identity() for _, layer in new_layers(net))
    load_state_dict(net, plain.state_dict(), strict=False)
    found = compare(plain, net, 255 * torch.rand(3, 128, 160))
    assert not found.changing
    assert found.largest <= 1e-5


@each_config
def test_weights_of_init_cfg_stay(path, tmp_path):
    cfg = start_as_identity(Config.fromfile(path))
    plain = trained_plain(cfg)
    torch.save(plain.backbone.state_dict(), tmp_path / "backbone.pth")
    cfg.model.backbone.module.init_cfg = dict(
        type="Pretrained", checkpoint=str(tmp_path / "backbone.pth")
    )
    net = build(cfg)
    net.init_weights()
    image = torch.rand(1, 3, 128, 160)
    with torch.no_grad():
        maps = [model.eval().backbone(image) for model in (plain, net)]
        for theirs, ours in zip(*maps, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max())


# --- training and prediction ---------------------------------------------------------------------


class Slopes(Hook):
    """Sums the absolute gradients of all parameters of a model's new layers."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def before_train(self, runner: Runner) -> None:
        optimized = {p for g in runner.optim_wrapper.param_groups for p in g["params"]}
        for layer_name, layer in new_layers(runner.model):
            for name, parameter in layer.named_parameters():
                assert parameter in optimized
                self.found[f"{layer_name}.{name}"] = 0.0
                parameter.register_post_accumulate_grad_hook(self.adder(f"{layer_name}.{name}"))

    def adder(self, name: str):
        def add(parameter):
            self.found[name] += parameter.grad.abs().sum().item()

        return add


def shrunk(path: Path, shapes: Path) -> Config:
    """Return a config with images of a fifth of the size and batches of two, and draw its data."""
    cfg = Config.fromfile(path)
    for part in nodes(cfg._cfg_dict):
        for key in ("scale", "img_scale", "border"):
            if isinstance(part.get(key), tuple):
                part[key] = tuple(side // 5 for side in part[key])
        if "img_size" in part:
            part["img_size"] //= 5
    for key in SPLIT_KEYS:
        cfg[key].update(batch_size=2, num_workers=0, persistent_workers=False)
        for leaf in leaves(cfg[key].dataset):
            leaf["type"] = f"mmyolo.{leaf['type']}"  # draw_sets looks in MMDetection
    cfg.optim_wrapper.optimizer.batch_size_per_gpu = 2
    cfg.train_cfg.update(max_epochs=1, val_interval=1)
    cfg.model.test_cfg.score_thr = 0.0  # untrained models only have low scores
    cfg.update(work_dir="work", launcher="none")
    draw_sets(cfg, shapes)
    return cfg


@each_config
def test_two_training_steps_and_a_prediction(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = (160, 128)
    shapes = Path("shapes")
    make_shapes(shapes, num_train=4, num_val=2, image_size=size, seed=3, max_objects=5)
    cfg = shrunk(path, shapes)
    runner = Runner.from_cfg(cfg)
    slopes = Slopes()
    runner.register_hook(slopes)
    runner.train()
    assert runner.iter == 2
    losses = runner.message_hub.log_scalars["train/loss"].data[0]
    assert len(losses) == 2
    assert all(0 < loss < float("inf") for loss in losses)
    assert len({name.rpartition(".")[0] for name in slopes.found}) >= len(EMA_PLACES)
    assert min(slopes.found.values()) > 0, slopes.found
    assert runner.message_hub.get_scalar("val/coco/bbox_mAP").current() >= 0

    detector = Detector(cfg, "work/epoch_1.pth", "cpu")
    (image, *_) = sorted(Path("data/coco/val2017").glob("*.jpg"))
    (sample,) = detector.detect([detector.load(str(image))])
    boxes = sample.pred_instances.bboxes
    assert len(boxes) > 0
    assert torch.isfinite(boxes).all()
    assert boxes.min() >= 0
    assert (boxes.amax(0) <= torch.tensor(size * 2)).all()
