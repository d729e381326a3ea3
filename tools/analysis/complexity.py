"""Count a config's parameters and GFLOPs, beside those without this package's layers."""

import sys

from rfa_mmdet.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("complexity"))
