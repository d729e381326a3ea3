"""The receptive-field convolutions and the papers' formulas for them."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from rfa_mmdet.layers import RFAConv, RFCAConv, RFCBAMConv
from tests.helpers import formulas
from tests.helpers.formulas import Case, Exact, sigmoid


def rfcbam_conv(exact: Exact, case: Case, x: Tensor) -> Tensor:
    wide = formulas.side_by_side(formulas.features(exact, case, x), case.kernel)  # G
    hidden = exact.relu(x.flatten(2).mean(2) @ exact["se.fc.0.weight"].T)
    channel = sigmoid(hidden @ exact["se.fc.2.weight"].T)[:, :, None, None]
    pooled = torch.stack([exact.largest(wide, 1), wide.sum(1) / case.channels], 1)
    spatial = sigmoid(F.conv2d(pooled, exact["spatial.weight"], padding=1))
    return formulas.step_over(exact, case, wide * channel * spatial)


def rfca_conv(exact: Exact, case: Case, x: Tensor) -> Tensor:
    wide = formulas.side_by_side(formulas.features(exact, case, x), case.kernel)  # G
    weighted = formulas.coordinate_attention(exact, wide, "coordinate")
    return formulas.step_over(exact, case, weighted)


LAYERS = {
    "RFCBAMConv": (RFCBAMConv, rfcbam_conv),
    "RFCAConv": (RFCAConv, rfca_conv),
    "unfold": (
        partial(RFAConv, feature="unfold"),
        partial(formulas.rfa_conv, learnt=False),
    ),
}
