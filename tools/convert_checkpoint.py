"""Give the layers of a published checkpoint our names."""

import sys

from rfa_mmdet.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("convert_checkpoint"))
