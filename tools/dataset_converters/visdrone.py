"""Convert VisDrone2019-DET's text files to COCO's JSON, for configs/_base_/datasets/visdrone.py."""

import sys

from rfa_mmdet.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("visdrone"))
