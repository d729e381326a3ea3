"""Export a detector's network to ONNX, and verify it through MMDetection's post-processing.

The graphs map a normalised, padded batch to the raw outputs of the heads: backbone, neck and head.
A single-stage detector is one graph. For Faster, Mask and Cascade R-CNN, the first graph ends with
the neck's maps and the RPN head's outputs; each head on pooled regions is another graph, and the
runtime must implement RoIAlign between them. Batch size, height and width are dynamic.

``parts`` defines the graphs of a detector, ``graph`` writes and runs one, ``comparison`` compares
detections, and ``onnx`` combines them.
"""

from rfa_mmdet.export.comparison import Comparison
from rfa_mmdet.export.onnx import export_onnx
from rfa_mmdet.export.parts import parts

__all__ = ["Comparison", "export_onnx", "parts"]
