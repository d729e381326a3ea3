"""Count parameters and FLOPs of detectors, and of the RFAConv paper's classifiers.

A multiply-add counts as one FLOP, as in MMEngine's analyzer, which traces a forward pass on the
CPU. :mod:`rfa_mmdet.compat.flop_counts` adds the operators of attention layers that it lacks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from mmdet.registry import MODELS
from mmengine.analysis import FlopAnalyzer
from mmengine.analysis.jit_handles import elementwise_flop_counter
from mmengine.config import Config
from torch import Tensor, nn

from rfa_mmdet.compat.flop_counts import OP_COUNTS
from rfa_mmdet.errors import ConfigError
from rfa_mmdet.inference.detector import build_detector, image_channels
from rfa_mmdet.inference.region_heads import RegionHead, region_heads

CONVS = ("RFAConv", "RFCBAMConv", "RFCAConv", "CAMConv", "CBAMConv", "CAConv")
# Arguments used for the comparison.
PLUGINS = {
    "EMA": dict(factor=32),
    "ConAM": dict(patch_size=4, hidden_channels=16),
    "CBAM": {},
    "CoordAtt": {},
    "SE": {},
    "ECA": {},
}


class Published(NamedTuple):
    """One entry of the paper's table; GFLOPs are None if not published."""

    parameters: int
    gflops: float | None


# arXiv 2304.03198, comparison on ImageNet-1k: ResNet with the layer instead of the first 3x3
# convolution of every BasicBlock, bias=True, 1000 classes, 224 x 224. None: plain ResNet.
PUBLISHED = {
    (18, None): Published(11_689_512, 1.824),
    (18, "CAMConv"): Published(11_746_216, 1.825),
    (18, "CBAMConv"): Published(11_747_000, 1.826),
    (18, "CAConv"): Published(11_742_208, 1.827),
    (18, "RFAConv"): Published(11_850_408, 1.908),
    (18, "RFCAConv"): Published(11_887_936, 1.917),
    (18, "RFCBAMConv"): Published(11_884_408, 1.904),
    (34, None): Published(21_797_672, 3.679),
    (34, "CAMConv"): Published(21_926_376, 3.681),
    (34, "CBAMConv"): Published(21_927_944, 3.682),
    (34, "CAConv"): Published(21_912_984, 3.684),
    (34, "RFAConv"): Published(22_160_872, 3.843),
    (34, "RFCAConv"): Published(22_242_456, None),
    (34, "RFCBAMConv"): Published(22_237_704, None),
}
# Published with three decimals; how the smallest terms are counted is not documented.
GFLOPS_TOLERANCE = 0.002


@dataclass(frozen=True)
class Complexity:
    """Parameters and FLOPs of a network.

    Args:
        parameters (int): Number of parameters, including frozen ones.
        flops (int): Multiply-adds for one image.
        uncounted (dict[str, int]): Operators without a formula, missing in ``flops`` -> number of
            calls.
    """

    parameters: int
    flops: int
    uncounted: dict[str, int] = field(default_factory=dict)

    @property
    def gflops(self) -> float:
        """``flops`` in units of 10^9."""
        return self.flops / 1e9

    def agrees(self, published: Published) -> bool:
        """Return whether parameters are equal, and GFLOPs are equal except for rounding.

        Example:
            >>> Complexity(11_689_512, 1_824_000_000).agrees(PUBLISHED[18, None])
            True
        """
        return self.parameters == published.parameters and (
            published.gflops is None or abs(self.gflops - published.gflops) <= GFLOPS_TOLERANCE
        )


def _count(network: nn.Module, shape: tuple[int, ...], **handles: Any) -> Complexity:
    network.eval()
    analyzer = FlopAnalyzer(network, (torch.zeros(shape),))
    analyzer.set_op_handle(**{**OP_COUNTS, **handles})
    # Uncounted operators are returned; our layers' functional forwards do not call submodules.
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with torch.no_grad():
        flops = int(analyzer.total())
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Complexity(parameters, flops, dict(analyzer.unsupported_ops()))


# --- the paper's classifiers ---------------------------------------------------------------------


class _Classifier(nn.Module):
    def __init__(self, depth: int, conv: str | None) -> None:
        super().__init__()
        rfa = None if conv is None else dict(type=conv, bias=True)
        self.backbone = MODELS.build(dict(type="RFAResNet", depth=depth, rfa=rfa, out_indices=(3,)))
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.backbone(x)[0].mean((2, 3)))


def classifier_complexity(depth: int, conv: str | None) -> Complexity:
    """Count a classifier of the paper's table, with the table's rules.

    A multiply-add counts 1, batch norm 4 per element, average pooling over windows 1 per output,
    means over rows, columns or the map 1 per input element. Everything else counts nothing: means
    over channels, maxima, activations, softmax, products and biases.

    Args:
        depth (int): 18 or 34.
        conv (str | None): One of :data:`CONVS`, for the first 3x3 convolution of every block. None:
            plain.

    Returns:
        Complexity: Parameters and FLOPs at 224 x 224.

    Raises:
        ValueError: The classifier is not in the table.

    Example:
        >>> found = classifier_complexity(18, "RFAConv")
        >>> found.parameters, found.agrees(PUBLISHED[18, "RFAConv"])
        (11850408, True)
    """
    if (depth, conv) not in PUBLISHED:
        raise ValueError(
            f"depth={depth!r}, conv={conv!r}: not in the paper's table; depth must be 18 or 34, "
            f"and conv None or one of {CONVS}"
        )
    batch_norm = {"aten::batch_norm": elementwise_flop_counter(4, 0)}
    return _count(_Classifier(depth, conv), (1, 3, 224, 224), **batch_norm)


# --- detectors -----------------------------------------------------------------------------------


class _TwoStages(nn.Module):
    """A two-stage detector whose heads get the maximum number of regions.

    MMDetection's own raw forward runs them on whatever random weights propose.
    """

    def __init__(self, detector: TwoStageDetector, heads: list[RegionHead]) -> None:
        super().__init__()
        self.detector: TwoStageDetector = detector
        self.heads = heads

    def forward(self, images: Tensor) -> tuple:
        detector = self.detector
        cfg = detector.test_cfg
        most = dict(box=cfg.rpn.max_per_img, mask=cfg.rcnn.max_per_img)
        return detector.rpn_head(detector.extract_feat(images)), *(
            head.module(images.new_zeros(most[head.kind], *head.region)) for head in self.heads
        )


def detector_complexity(cfg: Config, image_size: tuple[int, int] = (800, 1333)) -> Complexity:
    """Count a detector, from the image to the raw outputs of its heads.

    Uses MMEngine's rules (batch norm counts 2 per element), extended by
    :data:`~rfa_mmdet.compat.flop_counts.OP_COUNTS`. RoI pooling and post-processing such as NMS are
    not counted.

    Args:
        cfg (Config): Config of a single-stage detector such as RetinaNet, or of Faster, Mask or
            Cascade R-CNN.
        image_size (tuple[int, int]): Height and width; padded as the config's
            ``data_preprocessor`` does. Defaults to (800, 1333).

    Returns:
        Complexity: Parameters and FLOPs for one image, with ``test_cfg.rpn.max_per_img`` proposals
        for box heads, in each stage of a cascade, and ``test_cfg.rcnn.max_per_img`` detections for
        mask heads.

    Raises:
        ConfigError: The image size is not positive, the kind of detector is not supported, or the
            detector fails on such an image.

    Example:
        >>> from mmengine.hub import get_config
        >>> cfg = get_config("mmdet::retinanet/retinanet_r18_fpn_1x_coco.py")
        >>> found = detector_complexity(cfg, (64, 60))
        >>> found.parameters, found.gflops
        (21410100, 0.759052288)
    """
    if min(image_size) < 1:
        raise ConfigError(f"image_size={tuple(image_size)}: must be positive")
    detector = build_detector(cfg)
    network = detector
    if heads := region_heads(detector):
        network = _TwoStages(detector, heads)
    elif not isinstance(detector, SingleStageDetector):
        raise ConfigError(
            f"model.type={type(detector).__name__!r}: not supported; can only count single-stage "
            "detectors, and Faster, Mask and Cascade R-CNN with an RPN and without a shared head. "
            "For others, use MMDetection's tools/analysis_tools/get_flops.py, which needs the "
            "data; RFA_MMDET_COMPAT=flop_counts makes it count this package's layers"
        )
    divisor = getattr(detector.data_preprocessor, "pad_size_divisor", 1)
    sides = [-(-side // divisor) * divisor for side in image_size]
    failures: list[Exception] = []
    for channels in image_channels(detector):
        try:
            return _count(network, (1, channels, *sides))
        except Exception as error:  # a model may fail in any way on other images
            failures.append(error)
    raise ConfigError(
        f"model.type={type(detector).__name__!r}: fails on images of {sides[0]} x {sides[1]} "
        f"pixels with any number of channels from 1 to 16: {failures[0]}"
    ) from failures[0]


# --- all systems in one detector -----------------------------------------------------------------


def system_backbone(name: str | None) -> dict:
    """Return the config of a ResNet-50 with one of the layers in stages 2 to 4.

    Args:
        name (str | None): One of :data:`CONVS`, which replaces every 3x3 convolution, without bias;
            or one of :data:`PLUGINS`, which is added after the last convolution of every block.
            None: plain.

    Example:
        >>> system_backbone("RFAConv")["rfa"]
        {'type': 'RFAConv'}
    """
    stages = (False, True, True, True)
    backbone = dict(type="RFAResNet", depth=50)
    if name in CONVS:
        return dict(**backbone, rfa=dict(type=name), stage_with_rfa=stages)
    if name is not None:
        plugin = dict(type=name, **PLUGINS[name])
        return dict(**backbone, plugins=[dict(cfg=plugin, stages=stages, position="after_conv3")])
    return backbone


def system_extras(image_size: tuple[int, int] = (800, 1333)) -> Iterator[tuple[str, Complexity]]:
    """Yield the cost that each layer adds to a detector with a ResNet-50.

    Compares backbones only: the maps for neck and heads have the same shape with and without it.

    Args:
        image_size (tuple[int, int]): Height and width; padded to multiples of 32. Defaults to
            (800, 1333).

    Yields:
        tuple[str, Complexity]: The layer's name, and the difference from the plain backbone.
    """
    shape = (1, 3, *(-(-side // 32) * 32 for side in image_size))
    plain = _count(MODELS.build(system_backbone(None)), shape)
    for name in (*CONVS, *PLUGINS):
        found = _count(MODELS.build(system_backbone(name)), shape)
        yield name, Complexity(found.parameters - plain.parameters, found.flops - plain.flops)
