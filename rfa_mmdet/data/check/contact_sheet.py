"""Draw the worst images of a dataset as one picture."""

import os
from collections import defaultdict
from itertools import chain, zip_longest
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen is needed

from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from rfa_mmdet.data.check.audit import KINDS, Audit, Problem
from rfa_mmdet.data.check.images import read_image
from rfa_mmdet.files import written_whole
from rfa_mmdet.texts import drawable, drawn_as_written

_BAD, _GOOD = "#e8112d", "#3ddc84"
# Kinds that can be drawn.
_SHOWN = tuple(kind for kind in KINDS if kind != "not annotated")


def worst(found: Audit, number: int) -> list[tuple[str, list[Problem]]]:
    """Return the images to look at first.

    Takes the worst image of each kind of problem first, then the second worst of each, and so on,
    so a frequent problem does not hide a rare one.

    Args:
        found (Audit): Result of the audit.
        number (int): Maximum number of images.

    Returns:
        list: Pairs of path and problems, worst first; every image once.
    """
    of_path, of_kind = defaultdict(list), defaultdict(list)
    for problem in found.problems:
        of_path[problem.path].append(problem)
        of_kind[problem.kind].append(problem)
    ranked = [sorted(of_kind[kind], key=lambda p: -p.weight) for kind in _SHOWN]
    paths = dict.fromkeys(p.path for p in chain(*zip_longest(*ranked)) if p is not None)
    return [(path, of_path[path]) for path in list(paths)[:number]]


def save_contact_sheet(
    found: Audit, out: str | os.PathLike, columns: int = 4, rows: int = 4
) -> Path | None:
    """Draw the worst images with their boxes: wrong ones in red, the others in green.

    Args:
        found (Audit): Result of the audit.
        out (str | os.PathLike): PNG file to write.
        columns, rows (int): Layout of the sheet. Default to 4.

    Returns:
        Path | None: The file, or None if there is nothing to draw; then no file is written.
    """
    shown = worst(found, columns * rows)
    if not shown:
        return None
    rows = -(-len(shown) // columns)
    titles = [_title(path, problems) for path, problems in shown]
    with drawn_as_written(titles):
        figure, axes = plt.subplots(
            rows, columns, figsize=(3.6 * columns, 3.7 * rows), layout="constrained", squeeze=False
        )
        for one in axes.flat:
            one.axis("off")
        for one, title, (path, problems) in zip(axes.flat, titles, shown, strict=False):
            _draw(one, path, problems, found)
            one.set_title(title, fontsize=8, loc="left")
        with written_whole(out) as part:
            figure.savefig(part, dpi=100)
    plt.close(figure)
    return Path(out)


def _title(path: str, problems: list[Problem]) -> str:
    said = (p.text if p.text.startswith(p.kind) else f"{p.kind}: {p.text}" for p in problems)
    texts = list(dict.fromkeys(said))
    lines = [f"{os.path.basename(path)} ({problems[0].split})", *texts[:2]]
    if len(texts) > 2:
        lines.append(f"and {len(texts) - 2} more")
    return "\n".join(drawable(line, 52) for line in lines)


def _draw(axes, path: str, problems: list[Problem], found: Audit) -> None:
    bad = {problem.box for problem in problems if problem.box}
    boxes = [box for box in found.annotations[path].boxes if box not in bad]
    image, _ = read_image(path)
    if image is None:
        axes.text(0.5, 0.5, "cannot be read", ha="center", va="center", transform=axes.transAxes)
        axes.add_patch(Rectangle((0, 0), 1, 1, fill=False, ec="0.7", transform=axes.transAxes))
    else:
        height, width = image.shape[:2]
        axes.imshow(image[..., ::-1])
        _frame(axes, width, height, [box.xyxy for box in bad])
        for colour, group, line in ((_GOOD, boxes, 1.0), (_BAD, bad, 2.2)):
            for box in group:
                x1, y1, x2, y2 = box.xyxy
                axes.add_patch(
                    Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, ec=colour, lw=line)
                )
                if colour == _BAD:  # otherwise an empty box would be invisible
                    axes.plot((x1 + x2) / 2, (y1 + y2) / 2, "+", color=_BAD, ms=10, mew=2)


def _frame(axes, width: int, height: int, boxes: list) -> None:
    """Show the image and boxes outside of it, up to half an image on each side."""
    xs = [0, width, *(value for box in boxes for value in box[::2])]
    ys = [0, height, *(value for box in boxes for value in box[1::2])]
    margin = 0.02 * max(width, height)
    axes.set_xlim(max(min(xs), -width / 2) - margin, min(max(xs), 1.5 * width) + margin)
    axes.set_ylim(min(max(ys), 1.5 * height) + margin, max(min(ys), -height / 2) - margin)
