"""Draw what each attention layer attends to, as heat maps over images, one PNG per image."""

import sys

from rfa_mmdet.cli import run_tool

if __name__ == "__main__":
    sys.exit(run_tool("visualize_attention"))
