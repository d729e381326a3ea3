"""Draw what each attention layer attends to, as heat maps over images, one PNG per image.

For RFAConv, the heat ('focus', 0 to 1) shows where it prefers some positions of its window; for the
others ('weight'), how much of the features passes. --compare also draws the detections of two
models side by side.
"""

from argparse import Namespace
from pathlib import Path

from mmdet.structures import DetDataSample
from mmengine.model import BaseTTAModel

from rfa_mmdet.analysis.attention_maps import attention_layers, heat_maps
from rfa_mmdet.analysis.pictures import draw_boxes, save_heats, save_side_by_side
from rfa_mmdet.cli.command_line import config_parser, print_left_out, progress, user_errors, within
from rfa_mmdet.config.check import check_config
from rfa_mmdet.config.read import load_config
from rfa_mmdet.errors import ConfigError
from rfa_mmdet.files import check_folder, written_whole
from rfa_mmdet.inference.detector import Detector, LoadedImage
from rfa_mmdet.inference.images import find_images, none_readable
from rfa_mmdet.inference.picture_names import picture_names
from rfa_mmdet.texts import first_line, printable

WIDTH = 320  # smallest width of a picture of detections, in pixels


def parse_args() -> Namespace:
    """Read the command line."""
    parser = config_parser(
        __doc__,
        "python tools/visualize_attention.py configs/demo/atss_r18-rfaconv_fpn_8e_shapes.py "
        "work_dirs/demo/epoch_8.pth data/shapes/JPEGImages/val_0000.jpg --layers 'layer4'",
    )
    add = parser.add_argument
    add("checkpoint", help="checkpoint file or URL")
    add("images", nargs="+", metavar="IMAGE", help="image, folder or quoted glob pattern")
    add("--layers", default="", metavar="REGEX", help="names of layers to draw; default: all")
    add("--compare", nargs=2, metavar=("CONFIG", "CHECKPOINT"),
        help="model to compare with; --cfg-options does not apply to it")  # fmt: skip
    add("--out", help="output folder; default: work_dirs/<config name>/attention")
    add("--score", type=within(0.0, 1.0), help="lowest score to draw with --compare (default: 0.3)")
    add("--device", help="device, e.g. cpu or cuda:1; default: the GPU if there is one")
    args = parser.parse_args()
    if args.score is not None and not args.compare:
        parser.error("--score: needs --compare")
    args.score = 0.3 if args.score is None else args.score
    return args


def load(config: str, checkpoint: str, device: str | None, options: dict) -> Detector:
    """Build a detector."""
    cfg = load_config(config, options)
    check_config(cfg)
    detector = Detector(cfg, checkpoint, device)
    if isinstance(detector.model, BaseTTAModel):
        raise ConfigError(
            f"config={config!r}: model.type={type(detector.model).__name__!r} runs the detector "
            "several times per image; use a config without test-time augmentation"
        )
    return detector


def share_of_image(sample: DetDataSample) -> tuple[float, float]:
    """Return the parts of the input's height and width that are image, not padding.

    A pipeline that pads, such as YOLOX's, counts its padding as image in ``img_shape``.
    """
    padded = sample.metainfo.get("batch_input_shape", sample.img_shape)
    wide, high = sample.metainfo.get("scale_factor", (1, 1))[:2]
    original = sample.metainfo.get("ori_shape", sample.img_shape)
    resized = (original[0] * high, original[1] * wide)
    parts = zip(resized, sample.img_shape, padded, strict=True)
    height, width = (min(own, shape) / whole for own, shape, whole in parts)
    return height, width


def show(
    args: Namespace,
    detectors: dict[str, Detector],
    images: dict[str, LoadedImage],
    heats_out: Path,
    detections_out: Path,
) -> None:
    """Write the pictures of one image, as loaded by each detector's pipeline."""
    first = next(iter(detectors))
    rgb = images[first].picture[..., ::-1]
    heats, (sample,) = heat_maps(
        detectors[first].model, lambda: detectors[first].detect([images[first]]), args.layers
    )
    if not heats:
        raise ConfigError(
            f"--layers {args.layers!r}: these layers only see regions, none sees the whole image"
        )
    seen = share_of_image(sample)
    with written_whole(heats_out) as part:
        save_heats(rgb, heats, part, seen)
    if len(detectors) > 1:
        pictures = {}
        for name, detector in detectors.items():
            found = sample if name == first else detector.detect([images[name]])[0]
            classes = detector.model.dataset_meta["classes"]
            rgb = images[name].picture[..., ::-1]
            boxes = found.pred_instances.cpu()
            pictures[name] = draw_boxes(rgb, boxes, classes, args.score, -(-WIDTH // rgb.shape[1]))
        with written_whole(detections_out) as part:
            save_side_by_side(pictures, part)


def main() -> None:
    """Run the command line."""
    args = parse_args()
    folder = Path(args.out or Path("work_dirs", Path(args.config).stem, "attention"))
    with user_errors():
        check_folder(folder, "--out")
        paths = find_images(args.images, without=folder)
        names = [Path(args.config).stem]
        detectors = {names[0]: load(args.config, args.checkpoint, args.device, args.cfg_options)}
        try:  # fail before reading images
            attention_layers(detectors[names[0]].model, args.layers)
        except ValueError as error:
            what = f"--layers {args.layers!r}" if args.layers else f"config={args.config!r}"
            raise ConfigError(f"{what}: {error}") from error
        if args.compare:
            other = Path(args.compare[0]).stem
            if other in names:
                other = f"{other}, {Path(args.compare[1]).stem}"
            config, checkpoint = args.compare
            detectors[other] = load(config, checkpoint, args.device, {})
        pictures = picture_names(paths, ".png", "_detections.png")
        skipped: dict[str, str] = {}
        for path in progress("drawing")(paths):
            try:
                images = {name: detector.load(path) for name, detector in detectors.items()}
                show(args, detectors, images, *(folder / name for name in pictures[path]))
            except ConfigError:  # does not depend on the image
                raise
            except Exception as error:  # a model may fail in any way on an odd image
                skipped[path] = first_line(error)
        if len(skipped) == len(paths):
            raise none_readable(skipped)
    print(f"pictures: {printable(folder)}")
    print_left_out(len(paths), skipped)
