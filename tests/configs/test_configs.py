"""Templates for custom data; test_shipped_configs.py has the checks for all configs."""

from mmengine.config import Config

from tests.helpers.paths import ROOT


def test_custom_template_takes_root_and_classes_from_the_environment(monkeypatch):
    monkeypatch.setenv("DATA_ROOT", "/some/where")
    monkeypatch.setenv("CLASSES", "traffic light, car")
    for data in ("coco", "voc"):
        cfg = Config.fromfile(
            ROOT / f"configs/custom/retinanet_r18-rfaconv_fpn_50e_custom-{data}.py"
        )
        assert cfg.model.bbox_head.num_classes == 2
        for split in ("train", "val", "test"):
            dataset = cfg[f"{split}_dataloader"].dataset
            assert dataset.metainfo.classes == ("traffic light", "car")
            assert dataset.data_root == "/some/where/"
