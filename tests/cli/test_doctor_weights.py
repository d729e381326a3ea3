"""tools/doctor.py lists pretrained weights in torch's cache."""

import re

from tests.helpers.environment import Environment


def test_cached_pretrained_weights(tmp_path):
    sick = Environment(tmp_path / "venv")
    folder = tmp_path / "home" / "hub" / "checkpoints"
    code, text = sick.examine(TORCH_HOME=str(tmp_path / "home"))
    assert code == 0
    assert re.search(rf"(?m)^weights +none +{folder} \(downloaded on first use", text)
    folder.mkdir(parents=True)
    for name in ("resnet50-0676ba61.pth", "resnet18-f37072fd.pth", "resnet50-a.pth", "other.pth"):
        (folder / name).touch()
    text = sick.examine(TORCH_HOME=str(tmp_path / "home"))[1]
    assert re.search(rf"(?m)^weights +resnet18, resnet50 +{folder}$", text)
