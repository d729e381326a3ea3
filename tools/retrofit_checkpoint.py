"""Write a warm-started checkpoint of a retrofitted detector, from one of the plain detector."""

import sys

from rfa_mmdet.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("retrofit_checkpoint"))
