"""Reads images that a user gives, and refuses what is not one, or is too large, before it is decoded."""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ImageError, ReadError
from ..flash.plain_files import reading
from ..source.zoos import INSTALL_MLX_VLM

MOST_BYTES = 8 << 20  # of one image's file
MOST_PIXELS = 24_000_000  # of one image as it is stored
MOST_SIDE = 16_384  # pixels of a side as it is stored; to scale a very long one takes more memory than the image
PIXEL_BYTES = 6  # the most that decoding takes per pixel
MORE_PIXEL_BYTES = {"WEBP": 16, "CMYK": 8}  # likewise, for other formats and modes of Pillow
DECODED_BYTES = PIXEL_BYTES * MOST_PIXELS  # the most of one image while it is decoded
SEEN_PIXELS = 1 << 20  # of all images of a prompt together, as the model sees them
MOST_IMAGES = 16  # of a prompt
MOST_WAITING = 2  # prompts with images that wait in a server; each holds what the model takes
BAND_PIXELS = 1 << 20  # that are converted at once
# The most that one image takes while it is decoded, those of a prompt once they are, and the files of some prompts.
HELD_BYTES = DECODED_BYTES + 4 * SEEN_PIXELS * MOST_IMAGES + 4 * MOST_BYTES
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
DATA_URL = re.compile(r"data:(?P<type>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*(?P<base64>;base64)?,", re.ASCII)


@dataclass(frozen=True)
class Picture:
    """A decoded image. pixels: Pillow's, RGB."""

    pixels: Any


def read_image(path: str) -> Picture:
    """The image in a file. Raises ImageError."""
    return decode(read_file(Path(path)), path)


def read_file(path: Path) -> bytes:
    """The bytes of an image's file. Raises ImageError for one that cannot be read, or is too large."""
    try:
        with reading(path), path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except ReadError as error:
        raise ImageError(str(error)) from None
    if len(content) > MOST_BYTES:
        raise ImageError(f"{path} has more than {MOST_BYTES >> 20} MiB, the most for an image. Make it smaller.")
    return content


def from_url(url: str) -> bytes:
    """The bytes in a data URL. Raises ImageError for any other URL, because nothing is fetched."""
    if not url.startswith("data:"):
        kind = url.partition(":")[0] if ":" in url[:20] else "no scheme"
        raise ImageError(
            f"the image's URL has {kind!r}; nothing is fetched. Send the image itself: data:image/png;base64,..."
        )
    head = DATA_URL.match(url[:1000])
    if head is None or head["base64"] is None:
        raise ImageError("the image's data URL is not in base64; expected data:image/png;base64,...")
    return from_base64(url[head.end() :])


def from_base64(text: str) -> bytes:
    """The bytes of an image in base64. Raises ImageError."""
    try:
        content = base64.b64decode(text, validate=True) if len(text) <= MOST_BYTES // 3 * 4 + 8 else None
    except (binascii.Error, ValueError):
        raise ImageError("an image is not valid base64.") from None
    if content is None or len(content) > MOST_BYTES:
        raise ImageError(f"an image has more than {MOST_BYTES >> 20} MiB, the most for one. Make it smaller.")
    return content


def decode(content: bytes, name: str = "the image") -> Picture:
    """Decodes an image, scaled down to SEEN_PIXELS; of an animation the first frame. name: what messages call it.

    Its size is read first. Raises ImageError for another format than FORMATS, for a damaged image, and for one of more
    than MOST_PIXELS (fewer for those in MORE_PIXEL_BYTES) or with a side above MOST_SIDE.
    """
    try:
        from PIL import Image
    except ImportError:
        raise ImageError(f"images need mlx-vlm: `{INSTALL_MLX_VLM}`.") from None
    expected = f"expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about its size, which is compared below
            opened = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageError(f"{name} has more than {MOST_PIXELS} pixels, the most for one. Make it smaller.") from None
    except Exception:
        raise ImageError(f"{name} begins with {content[:8]!r}, which is not a known image; {expected}.") from None
    (width, height), kind = opened.size, opened.mode if opened.mode in MORE_PIXEL_BYTES else str(opened.format)
    most = DECODED_BYTES // MORE_PIXEL_BYTES.get(kind, PIXEL_BYTES)
    if width * height > most:
        raise ImageError(f"{name} has {width} x {height} pixels; the most is {most} for {kind}. Make it smaller.")
    if max(width, height) > MOST_SIDE:
        raise ImageError(f"{name} has {width} x {height} pixels; the longest side is {MOST_SIDE}. Make it smaller.")
    try:
        return Picture(_drawn(opened))
    except Exception as error:
        raise ImageError(f"{name} ({opened.format}) is damaged: {' '.join(str(error).split())[:200]}.") from None


def _drawn(opened: Any) -> Any:
    """The image on white in RGB, turned as its EXIF data says, with at most SEEN_PIXELS.

    A large image is never copied as a whole: a JPEG is decoded in a smaller size, and bands of whole blocks of pixels
    are converted and averaged one after the other.
    """
    from PIL import Image, ImageOps

    share = SEEN_PIXELS / (opened.width * opened.height)
    if share < 1.0:
        opened.draft("RGB", tuple(max(1, int(side * share**0.5)) for side in opened.size))  # only a JPEG's decoder can
    width, height = opened.size
    side = max(1, int((width * height / SEEN_PIXELS) ** 0.5))  # of a block
    rows = max(1, BAND_PIXELS // (width * side)) * side
    drawn = Image.new("RGB", (-(-width // side), -(-height // side)))
    for top in range(0, height, rows):
        band = opened.crop((0, top, width, min(top + rows, height)))
        drawn.paste(_on_white(band).reduce(side), (0, top // side))
    drawn.info = {key: value for key, value in opened.info.items() if key != "transparency"}  # with the EXIF data
    return _at_most(ImageOps.exif_transpose(drawn), SEEN_PIXELS / (drawn.width * drawn.height))


def _on_white(pixels: Any) -> Any:
    """Pillow's image in RGB; what is transparent becomes white."""
    from PIL import Image

    if "A" in pixels.getbands() or "transparency" in pixels.info:
        behind = Image.new("RGBA", pixels.size, "white")
        pixels = Image.alpha_composite(behind, pixels.convert("RGBA"))
    return pixels.convert("RGB")


def check_count(count: int) -> None:
    """Raises ImageError for more than MOST_IMAGES, which are too many to be decoded for one prompt."""
    if count > MOST_IMAGES:
        raise ImageError(f"the prompt has {count} images; the most is {MOST_IMAGES}. Leave some out.")


def scaled(pictures: Sequence[Picture]) -> list[Any]:
    """Pillow's images, scaled down alike where all together have more than SEEN_PIXELS.

    Raises ImageError for more than MOST_IMAGES.
    """
    check_count(len(pictures))
    total = sum(picture.pixels.width * picture.pixels.height for picture in pictures)
    return [_at_most(picture.pixels, SEEN_PIXELS / total) for picture in pictures]


def _at_most(pixels: Any, share: float) -> Any:
    """The image with this share of its pixels, if that is less than all."""
    if share >= 1.0:
        return pixels
    width, height = (max(1, int(side * share**0.5)) for side in pixels.size)
    return pixels.resize((width, height))
