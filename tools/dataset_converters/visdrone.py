"""Convert VisDrone2019-DET's text files to COCO's JSON, for configs/_base_/datasets/visdrone.py."""

import sys

from rfa_mmdet.cli.visdrone import main

if __name__ == "__main__":
    sys.exit(main())
