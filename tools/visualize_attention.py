"""Show what each attention layer looks at, as heat maps over images, one PNG an image."""

import sys

from rfa_mmdet.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("visualize_attention"))
