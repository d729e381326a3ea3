"""MMDetection's visualizer, with labels that can be read on small objects."""

from typing import Any

from mmdet.visualization import DetLocalVisualizer

# MMDetection goes down to 6 for small boxes.
MIN_FONT_SIZE = 10


class LegibleVisualizer(DetLocalVisualizer):
    """Draws labels above their boxes, and never smaller than ``MIN_FONT_SIZE``.

    Args:
        *args, **kwargs: Arguments of ``DetLocalVisualizer``.
    """

    def draw_texts(
        self, texts: Any, positions: Any, font_sizes: Any = None, **kwargs: Any
    ) -> "LegibleVisualizer":
        """Draw one label, at the top left corner of its box."""
        if isinstance(font_sizes, int):
            font_sizes = max(font_sizes, MIN_FONT_SIZE)
            if positions[1] > 1.8 * font_sizes:  # else it would leave the image
                kwargs["vertical_alignments"] = "bottom"
        return super().draw_texts(texts, positions, font_sizes, **kwargs)
