"""Draw the ground truth next to the detections for every image of a test."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
from mmdet.structures import DetDataSample
from mmengine.fileio import get
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from rfa_mmdet.files import written_whole
from rfa_mmdet.inference.detector import draw
from rfa_mmdet.inference.picture_names import picture_names
from rfa_mmdet.inference.visualizer import LegibleVisualizer
from rfa_mmdet.texts import first_line, printable


class TruthAndDetectionsHook(Hook):
    """Draws every image of a test, with any names of files and classes.

    MMDetection's own hook overwrites pictures of images with the same name, and crashes on names
    that OpenCV cannot write. This hook reports images without a picture at the end.

    Args:
        folder (str | Path): Output folder.
        score (float): Lowest score to draw. Defaults to 0.3.
    """

    def __init__(self, folder: str | Path, score: float = 0.3) -> None:
        self.folder, self.score = Path(folder), score
        self.names: dict[str, list[Path]] = {}
        self.undrawn: dict[str, str] = {}

    def before_test(self, runner: Runner) -> None:
        """Choose the file names of the pictures."""
        dataset = runner.test_dataloader.dataset
        self.visualizer = LegibleVisualizer()
        paths = [dataset.get_data_info(i)["img_path"] for i in range(len(dataset))]
        self.names = picture_names(paths)

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Sequence[DetDataSample] | None = None,
    ) -> None:
        """Draw the images of a batch."""
        metainfo = runner.test_dataloader.dataset.metainfo
        for sample in outputs or ():
            try:
                image = mmcv.imfrombytes(get(sample.img_path), channel_order="rgb")
                options = dict(pred_score_thr=self.score)
                drawn = draw(self.visualizer, image, sample, metainfo, **options)
                with written_whole(self.folder / self.names[sample.img_path][0]) as part:
                    mmcv.imwrite(drawn[..., ::-1], str(part))
            except Exception as error:  # decoders raise anything
                self.undrawn[sample.img_path] = first_line(error)

    def after_test(self, runner: Runner) -> None:
        """Log the number of images without a picture."""
        for path, reason in list(self.undrawn.items())[:1]:
            print_log(
                f"no picture written for {len(self.undrawn)} images, e.g. {printable(path)}: "
                f"{printable(reason)}",
                logger="current",
            )
