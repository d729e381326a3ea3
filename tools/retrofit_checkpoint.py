"""Write a warm-started checkpoint of a retrofitted detector, from one of the plain detector."""

import sys

from rfa_mmdet.cli.retrofit_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
