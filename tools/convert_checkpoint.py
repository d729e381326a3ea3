"""Rename the layers of a published checkpoint to this package's names."""

import sys

from rfa_mmdet.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("convert_checkpoint"))
