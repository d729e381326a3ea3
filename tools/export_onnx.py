"""Export a detector's backbone, neck and head as ONNX, and compare it with ONNX Runtime."""

import sys

from rfa_mmdet.cli.export_onnx import main

if __name__ == "__main__":
    sys.exit(main())
