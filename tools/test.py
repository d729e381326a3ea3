"""Evaluate a detector."""

import sys

from rfa_mmdet.cli.test import main

if __name__ == "__main__":
    sys.exit(main())
