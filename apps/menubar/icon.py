"""The icon in the menu bar: a few characters on a coloured tile, drawn when they are first needed.

A coloured tile can be read on a light bar and on a dark one, so the system's theme does not matter.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIDE = 88  # pixels: four for each of the 22 points of the macOS menu bar
MARGIN = 3
COLOURS = {
    "stopped": "#6b7280",
    "starting": "#9a6700",
    "running": "#1a7f37",
    "stopping": "#9a6700",
    "failed": "#cf222e",
}


def draw(text: str, phase: str, file: Path) -> None:
    """Writes a PNG with `text` as large as it fits the tile. Raises OSError."""
    image = Image.new("RGBA", (SIDE, SIDE))
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle((0, 0, SIDE - 1, SIDE - 1), radius=SIDE // 6, fill=COLOURS[phase])
    size = SIDE
    while True:
        font = ImageFont.load_default(size)
        left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
        if (right - left <= SIDE - 2 * MARGIN and bottom - top <= SIDE * 0.7) or size <= 8:
            break
        size -= 2
    position = ((SIDE - left - right) / 2, (SIDE - top - bottom) / 2)
    pen.text(position, text, fill="white", font=font, stroke_width=1, stroke_fill="white")
    image.save(file, "PNG")


class Icons:
    """Icon files by text and phase. Each is drawn once and kept, because toolkits may read it at any time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[str, str], Path] = {}

    def file(self, text: str, phase: str) -> Path:
        key = (text, phase)
        if key not in self._known:
            file = self._folder / f"icon{len(self._known)}.png"
            draw(text, phase, file)
            self._known[key] = file
        return self._known[key]
