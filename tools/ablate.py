"""Compare methods over several seeds: train and test each, and report significant differences."""

import sys

from rfa_mmdet.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("ablate"))
