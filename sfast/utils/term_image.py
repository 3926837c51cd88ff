"""`print_image`: shows a picture in a terminal, as stable-fast's README does after generating one.

Each character cell is an upper half block: its foreground is one pixel, its background the pixel below, so a cell
carries two square pixels in 24-bit colour.
"""

import numpy as np
from PIL import Image


def print_image(image: Image.Image, max_width: int | None = None) -> None:
    """Prints `image` at most `max_width` characters wide (its own width if None), keeping its aspect ratio."""
    print(image_to_text(image, max_width))


def image_to_text(image: Image.Image, max_width: int | None = None) -> str:
    if max_width is not None and max_width < 1:
        raise ValueError(f"max_width must be at least 1 character, got {max_width}")
    width = min(image.width, max_width or image.width)
    height = max(1, round(image.height * width / image.width))
    height += height % 2  # two pixels to a cell
    pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BOX))  # [height, width, 3]
    lines = []
    for y in range(0, height, 2):
        cells = (
            "\x1b[38;2;{};{};{}m\x1b[48;2;{};{};{}m▀".format(*pixels[y, x], *pixels[y + 1, x]) for x in range(width)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)
