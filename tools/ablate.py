"""Compare methods over several seeds: train and test each, report what differences are worth."""

import sys

from rfa_mmdet.cli.ablate import main

if __name__ == "__main__":
    sys.exit(main())
