"""Input sizes to measure: those of the 3x3 convolutions in a ResNet-50, and small maps.

Larger windows use fewer of them, because formulas keep 25 or 49 values per input value.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class InputSize:
    """Input (batch, channels, height, width) of a convolution."""

    batch: int
    channels: int
    height: int
    width: int
    stride: int = 1
    kernel_size: int = 3

    def __str__(self) -> str:
        step = f"/{self.stride}" if self.stride > 1 else ""
        window = f" {self.kernel_size}x{self.kernel_size}" if self.kernel_size != 3 else ""
        return f"{self.batch}x{self.channels}x{self.height}x{self.width}{step}{window}"


def _resnet50(batch: int, height: int, width: int) -> list[InputSize]:
    """Return the 3x3s of all stages, and the first of stages 2 to 4, which halves the map."""
    shapes = []
    for stage, channels in enumerate((64, 128, 256, 512)):
        down = 4 * 2**stage
        if stage:
            shapes.append(InputSize(batch, channels, 2 * height // down, 2 * width // down, 2))
        shapes.append(InputSize(batch, channels, height // down, width // down))
    return shapes


# Images of 800 x 1333 are padded to a multiple of 32.
SIZES: dict[str, list[InputSize]] = {
    "r50-800x1333": _resnet50(1, 800, 1344),
    "r50-512x512": _resnet50(2, 512, 512),
    "gpu": _resnet50(2, 800, 1344),  # two images, as MMDetection's configs give each GPU
    "small": [
        InputSize(4, 64, 40, 40),
        InputSize(4, 128, 20, 20),
        InputSize(4, 128, 20, 20, 2),
        InputSize(4, 256, 10, 10),
        InputSize(4, 512, 5, 5),
        InputSize(1, 256, 13, 21),  # a coarse level of the FPN
    ],
    "few": [
        InputSize(1, 64, 128, 128),
        InputSize(1, 128, 128, 128, 2),
        InputSize(1, 128, 64, 64),
        InputSize(1, 256, 32, 32),
        InputSize(1, 512, 16, 16),
        InputSize(4, 64, 40, 40),
        InputSize(4, 256, 10, 10),
    ],  # a selection for larger windows
    "tiny": [
        InputSize(2, 64, 8, 12),
        InputSize(2, 64, 9, 7, 2),
    ],  # takes seconds
}
