"""Give the layers of a published checkpoint our names."""

import sys

from rfa_mmdet.cli.convert_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
