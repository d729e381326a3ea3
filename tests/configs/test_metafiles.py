"""model-index.yml and the metafiles that it imports say what the configs are."""

import pytest
import yaml

from tests.helpers.paths import ROOT
from tests.helpers.shipped import CONFIGS, METHODS, parts_of, read

DETECTORS = {
    "retinanet": {"RetinaNet", "FPN", "ResNet"},
    "faster-rcnn": {"Faster R-CNN", "FPN", "ResNet"},
    "mask-rcnn": {"Mask R-CNN", "FPN", "ResNet"},
    "cascade-rcnn": {"Cascade R-CNN", "FPN", "ResNet"},
    "fcos": {"FCOS", "FPN", "ResNet"},
    "atss": {"ATSS", "FPN", "ResNet"},
    "rtmdet": {"RTMDet", "CSPNeXt"},
    "yolox": {"YOLOX", "CSPDarknet"},
}
OPTIMIZERS = {"SGD": "SGD with Momentum", "AdamW": "AdamW"}


def test_every_method_is_in_the_index():
    index = yaml.safe_load((ROOT / "model-index.yml").read_text(encoding="utf-8"))
    assert index == {"Import": [f"configs/{method}/metafile.yml" for method in sorted(METHODS)]}


@pytest.mark.parametrize("method", METHODS)
def test_metafile_matches_its_configs(method):
    path = ROOT / "configs" / method / "metafile.yml"
    metafile = yaml.safe_load(path.read_text(encoding="utf-8"))
    (collection,) = metafile["Collections"]
    assert set(collection) == {"Name", "Metadata", "Paper", "README"}
    paths = [config for config in CONFIGS if config.parent.name == method]
    architectures = {METHODS[method].__name__}
    techniques = {"Weight Decay"}
    for config in paths:
        architectures |= DETECTORS[parts_of(config)["model"]]
        optimizer = read(config).optim_wrapper.optimizer
        techniques.add(OPTIMIZERS[optimizer.type])
        assert optimizer.weight_decay > 0
        assert optimizer.type != "SGD" or optimizer.momentum > 0
    metadata = collection["Metadata"]
    for key, found in (("Architecture", architectures), ("Training Techniques", techniques)):
        assert sorted(metadata[key]) == sorted(found), key
    for model in metafile["Models"]:
        assert set(model) == {"Name", "In Collection", "Config", "Metadata"}
        assert set(model["Metadata"]) == {"Training Data", "Epochs"}
