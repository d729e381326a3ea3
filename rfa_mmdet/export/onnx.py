"""Export a detector, compare it on images, and only then write the files."""

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
    """Export a detector, compare it on images, and write the files if the results agree.

    Args:
        detector (Detector): The detector, on the CPU.
        paths (Sequence[str]): Images to compare on; unreadable ones are skipped.
        out (str | os.PathLike): File of the first graph, '.onnx'.
        opset (int): ONNX operator set. Defaults to 17.
        progress (Callable): Wraps the iterable of images, e.g. in a progress bar.

    Returns:
        tuple: Pairs (file, description) of the graphs, and the comparison.

    Raises:
        UserError: The detector cannot be exported, no image can be read, or ONNX Runtime's results
            differ from PyTorch's; nothing is written then.
    """
    out = Path(out)
    if out.suffix != ".onnx":
        raise UserError(f"--out {out}: must end in .onnx")
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
                "the results of ONNX Runtime differ from those of PyTorch, so nothing was written: "
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
    """Return the preprocessed images, and what is wrong with the unreadable ones."""
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
    """Run the model's network with ONNX Runtime, and everything else with MMDetection."""
    replaced: list[tuple[nn.Module, str]] = []
    try:
        for graph in graphs:
            for module, name, function in graph.part.stand_ins(graph.run):
                setattr(module, name, function)
                replaced.append((module, name))
        yield
    finally:
        for module, name in replaced:
            delattr(module, name)  # restores the class's own
