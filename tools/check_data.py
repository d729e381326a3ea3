"""Look at every image and box that a config would load, and say what is wrong with them."""

import sys

from rfa_mmdet.cli.check_data import main

if __name__ == "__main__":
    sys.exit(main())
