"""Draw a small dataset of shapes, as COCO and as VOC."""

import sys

from rfa_mmdet.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("make_shapes"))
