"""Show what each attention layer looks at, as heat maps over images, one PNG an image.

Of RFAConv: where it prefers some positions of its window ('focus', 0 to 1). Of the others: how
much they let through ('weight'). With --compare, the detections of two models side by side.
"""

import os
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

from rfa_mmdet.analysis.attention_maps import attention_layers, heat_maps
from rfa_mmdet.analysis.pictures import draw_boxes, save_heats, save_side_by_side
from rfa_mmdet.cli.command_line import config_parser, progress, user_errors
from rfa_mmdet.config.check import check_config
from rfa_mmdet.config.read import load_config
from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole
from rfa_mmdet.inference.detector import Detector, LoadedImage
from rfa_mmdet.inference.images import ImageError, find_images, none_readable

WIDTH = 320  # pixels that a picture of detections has at least


def parse_args() -> Namespace:
    """Read the command line."""
    parser = config_parser(
        __doc__,
        "python tools/visualize_attention.py configs/demo/retinanet_r18-rfaconv_fpn_6e_shapes.py "
        "work_dirs/demo/epoch_6.pth data/shapes/JPEGImages/val_0000.jpg --layers 'layer4'",
    )
    add = parser.add_argument
    add("checkpoint", help="checkpoint file or URL")
    add("images", nargs="+", metavar="IMAGE", help="image, folder, or pattern in quotes")
    add("--layers", default="", metavar="PATTERN", help="regular expression; default: all layers")
    add("--compare", nargs=2, metavar=("CONFIG", "CHECKPOINT"), help="another model")
    add("--out", help="folder to write; default: work_dirs/<config name>/attention")
    add("--score", type=float, default=0.3, help="draw detections from here on (%(default)s)")
    add("--device", help="such as cpu or cuda:1; default: a GPU where there is one")
    args = parser.parse_args()
    if not 0 <= args.score <= 1:
        parser.error(f"--score {args.score}: must be from 0 to 1")
    return args


def load(config: str, checkpoint: str, device: str | None, options: dict) -> Detector:
    """Build a detector."""
    cfg = load_config(config, options)
    check_config(cfg)
    return Detector(cfg, checkpoint, device)


def picture_names(paths: list[str], common: str) -> dict[str, Path]:
    """Return the name of each image's picture below the output folder."""
    relative = {path: Path(os.path.relpath(os.path.abspath(path), common)) for path in paths}
    times = Counter(one.with_suffix("") for one in relative.values())
    return {
        # Of a.jpg beside a.png, whole names.
        path: one.with_suffix(".png" if times[one.with_suffix("")] == 1 else f"{one.suffix}.png")
        for path, one in relative.items()
    }


def show(
    args: Namespace, detectors: dict[str, Detector], images: dict[str, LoadedImage], out: Path
) -> None:
    """Write the pictures of one image, as each detector's pipeline has loaded it."""
    first = next(iter(detectors))
    rgb = images[first].picture[..., ::-1]
    heats, (sample,) = heat_maps(
        detectors[first].model, lambda: detectors[first].detect([images[first]]), args.layers
    )
    if not heats:
        raise UserError(
            f"--layers {args.layers!r}: none of these layers sees the whole image, only regions"
        )
    padded = sample.metainfo.get("batch_input_shape", sample.img_shape)
    seen = tuple(a / b for a, b in zip(sample.img_shape, padded, strict=True))
    with written_whole(out) as part:
        save_heats(rgb, heats, part, seen)
    if len(detectors) > 1:
        pictures = {}
        for name, detector in detectors.items():
            found = sample if name == first else detector.detect([images[name]])[0]
            classes = detector.model.dataset_meta["classes"]
            rgb = images[name].picture[..., ::-1]
            boxes = found.pred_instances.cpu()
            pictures[name] = draw_boxes(rgb, boxes, classes, args.score, -(-WIDTH // rgb.shape[1]))
        with written_whole(out.with_name(f"{out.stem}_detections.png")) as part:
            save_side_by_side(pictures, part)


def main() -> None:
    """Show every image that can be read."""
    args = parse_args()
    folder = Path(args.out or Path("work_dirs", Path(args.config).stem, "attention"))
    with user_errors():
        paths = find_images(args.images, without=folder)
        names = [Path(args.config).stem]
        detectors = {names[0]: load(args.config, args.checkpoint, args.device, args.cfg_options)}
        attention_layers(next(iter(detectors.values())).model, args.layers)  # before any image
        if args.compare:
            other = Path(args.compare[0]).stem
            if other in names:
                other = f"{other}, {Path(args.compare[1]).stem}"
            config, checkpoint = args.compare
            detectors[other] = load(config, checkpoint, args.device, {})
        common = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
        names_of = picture_names(paths, common)
        skipped: dict[str, str] = {}
        for path in progress("looking")(paths):
            try:
                images = {name: detector.load(path) for name, detector in detectors.items()}
            except ImageError as error:
                skipped[path] = str(error)
            else:
                show(args, detectors, images, folder / names_of[path])
        if len(skipped) == len(paths):
            raise none_readable(skipped)
    for path, damage in skipped.items():
        print(f"warning: skipped {path}: {damage}", file=sys.stderr)
    if skipped:
        print(f"skipped {len(skipped)} of {len(paths)} images")
    print(f"pictures: {folder}")
