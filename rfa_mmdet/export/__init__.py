"""A detector's network as ONNX, compared with itself through MMDetection's post-processing.

Exported is what maps a normalised, padded batch to the raw outputs of the heads: backbone, neck and
head. A single-stage detector is one graph. Of Faster, Mask and Cascade R-CNN the first graph ends
in the neck's maps and the RPN head's outputs; each head that sees pooled regions is another, and
RoIAlign is left to whoever runs them. Batch, height and width are dynamic.

``parts`` says which graphs a detector needs, ``graph`` writes and runs one, ``comparison`` compares
detections, and ``export`` does all of it.
"""

from rfa_mmdet.export.comparison import Comparison
from rfa_mmdet.export.onnx import export_onnx
from rfa_mmdet.export.parts import parts

__all__ = ["Comparison", "export_onnx", "parts"]
