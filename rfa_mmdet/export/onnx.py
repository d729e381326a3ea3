"""Export a detector, compare it on images, and only then name the files."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from rfa_mmdet.errors import UserError
from rfa_mmdet.export.comparison import Comparison
from rfa_mmdet.export.graph import Graph
from rfa_mmdet.export.parts import check_supported, parts
from rfa_mmdet.files import written_whole
from rfa_mmdet.inference.detector import Detector
from rfa_mmdet.inference.images import ImageError, none_readable


def export_onnx(
    detector: Detector,
    paths: Sequence[str],
    out: str | os.PathLike,
    opset: int = 17,
    progress: Callable[[Iterable], Iterable] = lambda items: items,
) -> tuple[list[tuple[Path, str]], Comparison]:
    """Export, compare on images, and only then give the files their names.

    Args:
        detector (Detector): Of a config and a checkpoint, on the CPU.
        paths (Sequence[str]): Images to compare on; those that cannot be read are left out.
        out (str | os.PathLike): Of the first graph, '.onnx'.
        opset (int): ONNX operator set. Defaults to 17.
        progress (Callable): Given the images, yields them as they are dealt with.

    Returns:
        tuple: (file, what it holds) of each graph, and the comparison.

    Raises:
        UserError: The detector cannot be exported, no image can be read, or ONNX Runtime computes
            something else than PyTorch; nothing is written then.
    """
    out = Path(out)
    if out.suffix != ".onnx":
        raise UserError(f"--out {out}: the file's name must end in .onnx")
    _need("onnx", "onnxruntime")
    model = detector.model
    check_supported(model)
    batches, skipped = _batches(detector, paths)
    needed = parts(model, batches[0][0])
    files = []
    with ExitStack() as stack, torch.no_grad():
        graphs = []
        for part in needed:
            path = out.with_name(f"{out.stem}{part.suffix}.onnx")
            file = stack.enter_context(written_whole(path))
            graphs.append(Graph(part, file, opset, model.dataset_meta["classes"]))
            files.append((path, part.holds))
        found = Comparison(skipped=skipped)
        for graph in graphs:
            found.add_raw(graph)
        for inputs, samples in progress(batches):
            with _through(graphs):
                ours = model.predict(inputs, [sample.clone() for sample in samples])
            theirs = model.predict(inputs, [sample.clone() for sample in samples])
            found.add_image(theirs[0], ours[0])
        if not found.agrees:
            raise UserError(
                "ONNX Runtime computes something else than PyTorch, so nothing was written: "
                f"{found}"
            )
    return files, found


def _need(*modules: str) -> None:
    for name in modules:
        try:
            __import__(name)
        except ImportError as error:
            raise UserError(f"{name} cannot be imported: pip install {name}") from error


def _batches(
    detector: Detector, paths: Iterable[str]
) -> tuple[list[tuple[Tensor, list[DetDataSample]]], dict[str, str]]:
    """Return each image as the model's network sees it, and what is wrong with the others."""
    batches, skipped = [], {}
    for path in paths:
        try:
            image = detector.load(path)
        except ImageError as error:
            skipped[path] = str(error)
            continue
        data = detector.model.data_preprocessor(detector.batch([image]), False)
        batches.append((data["inputs"], data["data_samples"]))
    if not batches:
        raise none_readable(skipped)
    return batches, skipped


@contextmanager
def _through(graphs: Iterable[Graph]) -> Iterator[None]:
    """Have the model's network run by ONNX Runtime; all else stays MMDetection's."""
    replaced: list[tuple[nn.Module, str]] = []
    try:
        for graph in graphs:
            for module, name, function in graph.part.stand_ins(graph.run):
                setattr(module, name, function)
                replaced.append((module, name))
        yield
    finally:
        for module, name in replaced:
            delattr(module, name)  # the class has its own
