"""Detect on images: annotated pictures, and all detections as COCO-format JSON."""

import sys

from rfa_mmdet.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("predict"))
