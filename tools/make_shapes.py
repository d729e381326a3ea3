"""Draw a small data set of shapes, as COCO and as VOC."""

import sys

from rfa_mmdet.cli.make_shapes import main

if __name__ == "__main__":
    sys.exit(main())
