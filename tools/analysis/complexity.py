"""Count a config's parameters and GFLOPs, compared with those without this package's layers."""

import sys

from rfa_mmdet.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("complexity"))
