"""The checks before a run: problems that they report, and data that they accept."""

import pytest
from mmdet.registry import DATASETS
from mmengine.config import Config

from rfa_mmdet.data.check import check_data, leaves
from rfa_mmdet.data.check.audit import audit
from tests.helpers.damaged_sets import (
    FILTER,
    coco_dataset,
    config,
    edit_json,
    errors_of,
    voc_dataset,
)

# --- nothing wrong


@pytest.mark.parametrize(
    "model", ["retinanet_r50_fpn", "faster-rcnn_r50_fpn", "cascade-mask-rcnn_r50_fpn"]
)
def test_valid_coco_data_gives_no_warnings(coco_made, model):
    evaluator = dict(type="CocoMetric", ann_file=str(coco_made / "val.json"))
    cfg = config(
        coco_dataset(coco_made), coco_dataset(coco_made, "val"), model, val_evaluator=[evaluator]
    )
    assert check_data(cfg, ("train", "val")) == []


def test_valid_voc_data_gives_no_warnings(voc_made):
    cfg = config(voc_dataset(voc_made), voc_dataset(voc_made, test_mode=True))
    for split in ("train", "val"):
        assert check_data(cfg, (split,)) == []


def test_everything_mmdet_loads_is_accepted(coco_made, voc_made):
    for dataset in (coco_dataset(coco_made), voc_dataset(voc_made)):
        check_data(config(dataset))
        assert len(DATASETS.build({**dataset, "pipeline": []})) > 0


def test_unlabelled_images_next_to_labelled_ones(coco):
    edit_json(coco / "val.json", lambda content: content.pop("annotations"))
    unlabelled = coco_dataset(coco, ann_file="val.json", filter_cfg=dict(filter_empty_gt=False))
    both = dict(type="ConcatDataset", datasets=[coco_dataset(coco), unlabelled])
    cfg = config(both)
    assert len(DATASETS.build(cfg.train_dataloader.dataset)) == 8
    (warning,) = check_data(cfg)
    assert "datasets.1: the 4 images of " in warning
    assert "have no box to learn from" in warning
    # Alone, nothing could be learnt from them.
    assert "have no box to learn from" in errors_of(config(unlabelled))


# --- splits


def test_the_same_files_for_training_and_validation(coco):
    same = coco_dataset(coco, test_mode=True)
    cfg = config(coco_dataset(coco), same)
    key = "val_dataloader.dataset"
    assert check_data(cfg, ("train", "val")) == [
        f"{key}: the same files as train_dataloader.dataset, so it is evaluated on training images"
    ]
    found = audit(cfg, ["train", "val"])
    assert [problem.kind for problem in found.problems] == ["in two splits"] * 4
    assert found.problems[0].text == "in train and val"
    for other in (dict(same, indices=2), coco_dataset(coco, "val")):
        assert check_data(config(coco_dataset(coco), other), ("train", "val")) == []


@pytest.mark.parametrize("keys", [None, ("img_id", "instances")])
def test_metric_without_a_file_needs_the_ground_truth(keys, voc):
    pack = dict(type="PackDetInputs", **(dict(meta_keys=keys) if keys else {}))
    val = voc_dataset(voc, test_mode=True, pipeline=[dict(type="LoadImageFromFile"), pack])
    cfg = config(None, val, val_evaluator=[dict(type="VOCMetric"), dict(type="CocoMetric")])
    if keys:
        assert check_data(cfg, ("val",)) == []
    else:
        message = errors_of(cfg, ("val",))
        assert "val_evaluator.1: without ann_file, CocoMetric takes the ground truth" in message


def test_model_and_validation_are_optional(coco_made):
    assert check_data(config(coco_dataset(coco_made), model=None), ("train", "val")) == []


# --- wrappers


def test_finds_the_dataset_in_every_wrapper(coco):
    cats = dict(type="ConcatDataset", datasets=[coco_dataset(coco), coco_dataset(coco, "gone")])
    balanced = dict(type="ClassBalancedDataset", oversample_thr=1e-3, dataset=cats)
    repeated = dict(type="RepeatDataset", times=2, dataset=balanced)
    cfg = config(dict(type="MultiImageMixDataset", dataset=repeated, pipeline=[FILTER]))
    found = leaves(cfg, "train")
    key = "train_dataloader.dataset.dataset.dataset.dataset.datasets"
    assert [leaf.key for leaf in found] == [f"{key}.0", f"{key}.1"]
    # In running order.
    names = [name for name, _ in found[0].transforms()]
    assert names == ["LoadImageFromFile", "LoadAnnotations", "FilterAnnotations"]
    message = errors_of(cfg)
    assert f"{key}.1.ann_file='gone.json'" in message
    assert f"{key}.0" not in message


def test_reports_several_problems_at_once(coco):
    (coco / "images" / "1.jpg").unlink()
    message = errors_of(config(coco_dataset(coco), num_classes=80))
    assert message.startswith("2 problems")
    assert "images are missing" in message
    assert "num_classes=80" in message


# --- what is not checked


def test_remote_data_are_not_checked(coco):
    dataset = coco_dataset(coco, ann_file="gone.json", backend_args=dict(backend="petrel"))
    (warning,) = check_data(config(dataset))
    assert "not checked, because it is on remote storage" in warning
    local = coco_dataset(coco, ann_file="gone.json", backend_args=dict(backend="local"))
    assert "gone.json does not exist" in errors_of(config(local))


@pytest.mark.parametrize(
    "changes",
    [
        dict(data_prefix=dict(img="s3://bucket/train")),
        dict(data_prefix=dict(img="https://example.org/train/")),
        dict(pipeline=[dict(type="LoadImageFromFile", backend_args=dict(backend="petrel"))]),
    ],
)
def test_remote_images_of_local_annotations_are_not_checked(coco, changes):
    (warning,) = check_data(config(coco_dataset(coco, **changes)))
    assert "images not checked, because they are on remote storage, e.g. " in warning
    found = audit(config(coco_dataset(coco, **changes)), ["train"])
    assert (found.images, found.problems) == ({}, [])
    assert found.skipped == ["train_dataloader.dataset"]


def test_empty_backend_args_are_local(coco):
    assert check_data(config(coco_dataset(coco, backend_args={}))) == []


@pytest.mark.parametrize("kind", ["Objects365V2Dataset", "WIDERFaceDataset"])
def test_datasets_that_read_files_in_their_own_way_are_not_audited(kind, coco):
    """They are neither wrong nor known to be right."""
    dataset = coco_dataset(coco, type=kind)
    found = audit(Config(dict(train_dataloader=dict(dataset=dataset))), ["train"])
    assert (found.images, found.problems) == ({}, [])
    assert found.skipped == ["train_dataloader.dataset"]


@pytest.mark.parametrize("prefix", [{}, dict(img_path="images")])
def test_coco_without_an_image_folder(coco, prefix):
    message = errors_of(config(coco_dataset(coco, data_prefix=prefix)))
    assert f"train_dataloader.dataset.data_prefix={prefix}: must have the key 'img'" in message


def test_other_datasets_only_need_their_annotation_file(tmp_path):
    dataset = dict(type="BaseDetDataset", data_root=str(tmp_path), ann_file="a.json")
    assert "a.json does not exist" in errors_of(config(dataset))
    (tmp_path / "a.json").write_text("{}")
    assert check_data(config(dataset)) == []


def test_wrong_arguments_of_a_dataset(coco):
    for wrong in ("annfile", "file_client_args"):
        message = errors_of(config(coco_dataset(coco, **{wrong: "train.json"})))
        assert "train_dataloader.dataset cannot be built" in message
        assert wrong in message
