"""Test images with the truth, and with what each method finds on them."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
import mmengine
import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

from rfa_mmdet.analysis.pictures import draw_boxes
from rfa_mmdet.files import written_whole
from rfa_mmdet.studies.folders import Folder, write_json
from rfa_mmdet.studies.spec import Run, Spec

SCORE = 0.3
WIDTH = 480  # pixels that a picture has at least


def draw_samples(spec: Spec, work_dir: str | os.PathLike) -> dict[str, Any]:
    """Draw some of the test images, by the first finished seed of the last stage.

    Args:
        spec (Spec): What is compared.
        work_dir (str | os.PathLike): Of the comparison; pictures go to ``samples`` in it.

    Returns:
        dict[str, Any]: ``stage``, ``seed``, ``score`` (detections below are left out),
        ``columns``, 'truth' and the methods, and ``rows``, a list of files for each image. Also in
        samples.json; empty where no test is finished, or no samples are wanted.
    """
    out = Path(work_dir, "samples")
    chosen = _finished(spec, work_dir)
    if not chosen or not spec.samples:
        return {}
    found = {run.method: mmengine.load(Folder(work_dir, run).predictions) for run in chosen}
    cfg = Config.fromfile(Folder(work_dir, chosen[0]).config)
    init_default_scope(cfg.get("default_scope") or "mmdet")
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    by_path = {
        method: {sample["img_path"]: sample["pred_instances"] for sample in samples}
        for method, samples in found.items()
    }
    number = min(spec.samples, len(dataset))
    rows = []
    for i in range(number):
        info = dataset.get_data_info(i * len(dataset) // number)
        image = mmcv.imread(info["img_path"], channel_order="rgb")
        columns = {"truth": (_truth(info["instances"]), None)}
        for method, samples in by_path.items():
            columns[method] = (InstanceData(**samples[info["img_path"]]), SCORE)
        scale = -(-WIDTH // image.shape[1])
        names = []
        for name, (instances, score) in columns.items():
            drawn = draw_boxes(image, instances, dataset.metainfo["classes"], score, scale)
            names.append(f"{i}_{name}.jpg")
            with written_whole(out / names[-1]) as part:
                mmcv.imwrite(drawn[..., ::-1], str(part))
        rows.append(names)
    samples = dict(
        stage=chosen[0].stage,
        seed=chosen[0].seed,
        score=SCORE,
        columns=["truth", *found],
        rows=rows,
    )
    write_json(out / "samples.json", samples)
    return samples


def stored_samples(work_dir: str | os.PathLike) -> dict[str, Any]:
    """Return what was drawn before; empty if nothing was.

    Args:
        work_dir (str | os.PathLike): Of the comparison.
    """
    path = Path(work_dir, "samples", "samples.json")
    return json.loads(path.read_text()) if path.is_file() else {}


def _finished(spec: Spec, work_dir: str | os.PathLike) -> Sequence[Run]:
    for stage in reversed(spec.stages):
        for seed in stage.seeds:
            runs = [Run(stage.name, method, seed) for method in stage.methods]
            done = [r for r in runs if Folder(work_dir, r).finished]
            done = [r for r in done if Folder(work_dir, r).predictions.is_file()]
            if done:
                return done
    return ()


def _truth(objects: list[dict]) -> InstanceData:
    boxes = [one["bbox"] for one in objects]
    return InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor([one["bbox_label"] for one in objects], dtype=torch.long),
    )
