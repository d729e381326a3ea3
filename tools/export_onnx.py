"""Export a detector's backbone, neck and head as ONNX, and compare it with ONNX Runtime."""

import sys

from rfa_mmdet.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("export_onnx"))
