"""Evaluate a detector."""

import sys

from rfa_mmdet.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("test"))
