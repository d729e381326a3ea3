"""Check every image and box that a config loads, and report all problems."""

import sys

from rfa_mmdet.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("check_data"))
