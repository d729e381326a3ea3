"""Draw a data set, train a small RetinaNet with RFAConv on it, evaluate it and show it."""

import sys

from rfa_mmdet.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("demo"))
