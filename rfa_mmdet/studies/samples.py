"""Draw test images with the ground truth and each method's detections."""

from typing import Any

import mmcv
import mmengine
import numpy as np
import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from rfa_mmdet.analysis.pictures import draw_boxes
from rfa_mmdet.data.check.images import read_image
from rfa_mmdet.files import written_whole
from rfa_mmdet.studies.run import Run
from rfa_mmdet.studies.study import Study

SCORE = 0.3
MIN_WIDTH = 480  # smallest width of a picture, in pixels


def draw_samples(study: Study) -> dict[str, Any]:
    """Draw test images into ``samples``, with detections of the last stage's first finished seed.

    Returns:
        dict[str, Any]: ``stage``, ``seed``, ``score`` (lowest score drawn), ``columns`` ('truth'
        and the methods), and ``rows`` (files of each image, one per column). Empty if no test is
        finished or the spec has samples=0.
    """
    runs = _finished(study)
    if not runs or not study.samples:
        return {}
    found = {
        run.method: {
            sample["img_path"]: InstanceData(**sample["pred_instances"])
            for sample in mmengine.load(run.predictions)
        }
        for run in runs
    }
    cfg = Config.fromfile(runs[0].config)
    init_default_scope(cfg.get("default_scope") or "mmdet")
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    number = min(study.samples, len(dataset))
    rows = []
    for i in range(number):
        info = dataset.get_data_info(i * len(dataset) // number)
        image, _ = read_image(info["img_path"])
        if image is None:
            continue
        image = np.ascontiguousarray(image[..., ::-1])
        scale = -(-MIN_WIDTH // image.shape[1])
        truth = InstanceData(
            bboxes=torch.Tensor([one["bbox"] for one in info["instances"]]).reshape(-1, 4),
            labels=torch.LongTensor([one["bbox_label"] for one in info["instances"]]),
        )
        shown = {"truth": truth, **{m: own[info["img_path"]] for m, own in found.items()}}
        for name, instances in shown.items():
            score = None if instances is truth else SCORE
            drawn = draw_boxes(image, instances, dataset.metainfo["classes"], score, scale)
            with written_whole(study.work_dir / "samples" / f"{i}_{name}.jpg") as part:
                mmcv.imwrite(drawn[..., ::-1], str(part))
        rows.append([f"{i}_{name}.jpg" for name in shown])
    first = runs[0]
    columns = ["truth", *found]
    return dict(stage=first.stage, seed=first.seed, score=SCORE, columns=columns, rows=rows)


def _finished(study: Study) -> list[Run]:
    """Return the runs of one seed whose detections can be drawn."""
    for stage in reversed(study.stages.values()):
        for seed in stage.seeds:
            runs = [run for run in study.runs(stage.name) if run.seed == seed]
            if done := [run for run in runs if run.finished and run.predictions.is_file()]:
                return done
    return []
