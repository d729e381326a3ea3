"""The paper's parameter counts of ResNet with each convolution, with a bias."""

import pytest
import torch

from rfa_mmdet.models.backbones.rfa_resnet import RFAResNet

# arXiv 2304.03198, 1000 classes.
PARAMETERS = {
    None: (11_689_512, 21_797_672),
    "CAMConv": (11_746_216, 21_926_376),
    "CBAMConv": (11_747_000, 21_927_944),
    "CAConv": (11_742_208, 21_912_984),
    "RFAConv": (11_850_408, 22_160_872),
    "RFCAConv": (11_887_936, 22_242_456),
    "RFCBAMConv": (11_884_408, 22_237_704),
}


@pytest.mark.parametrize("conv", PARAMETERS)
@pytest.mark.parametrize(("index", "depth"), [(0, 18), (1, 34)])
def test_parameters_match_the_paper(conv, index, depth):
    with torch.device("meta"):
        backbone = RFAResNet(depth, rfa=conv and dict(type=conv, bias=True))
        classifier = torch.nn.Linear(512, 1000)
    found = sum(p.numel() for net in (backbone, classifier) for p in net.parameters())
    assert found == PARAMETERS[conv][index]
