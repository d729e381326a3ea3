"""Look at every image and box that a config would load, and say what is wrong with them."""

import sys

from rfa_mmdet.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("check_data"))
