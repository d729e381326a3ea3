"""Draw a dataset, train a small detector with RFAConv on it, evaluate it and show the results."""

import sys

from rfa_mmdet.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("demo"))
