"""Detect on images: annotated pictures, and all detections as COCO-format JSON."""

import sys

from rfa_mmdet.cli.predict import main

if __name__ == "__main__":
    sys.exit(main())
