"""Show what each attention layer looks at, as heat maps over images, one PNG an image."""

import sys

from rfa_mmdet.cli.visualize_attention import main

if __name__ == "__main__":
    sys.exit(main())
