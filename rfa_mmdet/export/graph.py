"""Export one part of a detector to a file, and run it with ONNX Runtime."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfa_mmdet.errors import UserError
from rfa_mmdet.export.parts import Part
from rfa_mmdet.ops.common.torch_versions import TRACES_TO_ONNX
from rfa_mmdet.texts import first_line


class Graph:
    """A part of a detector as an ONNX graph.

    Args:
        part (Part): The part, in eval mode on the CPU.
        file (Path): File to write.
        opset (int): ONNX operator set.
        classes (Sequence[str]): The detector's classes, for the file's metadata.

    Raises:
        UserError: PyTorch cannot export it, or ONNX Runtime cannot load it.
    """

    def __init__(self, part: Part, file: Path, opset: int, classes: Sequence[str]) -> None:
        self.part = part
        _write(part, file, opset)
        try:
            _describe(file, dict(holds=part.holds, classes=json.dumps(classes), **part.facts))
            self._session = _session(file)
        except Exception as error:  # onnx and onnxruntime share no base class of errors
            raise UserError(
                f"ONNX Runtime cannot load the model: {first_line(error)}. Operators of mmcv, such "
                "as deformable convolutions, are not part of ONNX"
            ) from error

    def run(self, inputs: Tensor) -> list[Tensor]:
        """Return ONNX Runtime's outputs."""
        arrays = self._session.run(None, {self.part.input_name: inputs.numpy()})
        return [torch.from_numpy(array) for array in arrays]


def _write(part: Part, file: Path, opset: int) -> None:
    with warnings.catch_warnings():
        # Tracing warns about sizes compared in Python; the comparison shows whether they matter.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                part.eval(),
                (part.example,),
                str(file),
                input_names=[part.input_name],
                output_names=list(part.outputs),
                dynamic_axes={part.input_name: part.axes, **part.outputs},
                opset_version=opset,
                **TRACES_TO_ONNX,
            )
        except (RuntimeError, ValueError) as error:  # includes the exporter's own errors
            reason = first_line(error)
            raise UserError(f"opset {opset}: PyTorch cannot export the model: {reason}") from error


def _describe(file: Path, facts: dict[str, str]) -> None:
    """Write metadata into the file, and check it."""
    import onnx

    model = onnx.load(str(file))
    onnx.checker.check_model(model)
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, str(file))


def _session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
