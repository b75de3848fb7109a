"""What is accepted as an image, and what is refused before it is decoded."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_flash.errors import ImageError
from mlx_flash.text import images
from mlx_flash.text.chat_template import with_images
from mlx_flash.text.images import decode, from_base64, from_url, read_file, read_image, scaled

Image = pytest.importorskip("PIL.Image")


def picture(size: tuple[int, int] = (5, 3), mode: str = "RGB") -> Any:
    width, height = size
    depth = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    numbers = np.random.default_rng(0).integers(0, 256, (height, width, depth), np.uint8)
    return Image.fromarray(numbers.squeeze(-1) if depth == 1 else numbers, mode)


def encoded(kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture(**options).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", images.FORMATS)
def test_formats(kind: str) -> None:
    found = decode(encoded(kind)).pixels
    assert found.mode == "RGB" and found.size == (5, 3)


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "PPM"])
def test_other_formats(kind: str) -> None:
    with pytest.raises(
        ImageError, match=r"a\.x begins with .* not a known image; expected PNG, JPEG, WEBP, GIF or BMP"
    ):
        decode(encoded(kind), "a.x")


def test_what_is_transparent_is_white() -> None:
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    file = io.BytesIO()
    clear.save(file, "PNG")
    assert decode(file.getvalue()).pixels.getpixel((0, 0)) == (255, 255, 255)
    assert decode(encoded(mode="L")).pixels.mode == "RGB"


def test_an_image_that_claims_to_be_large_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 kB of zeros that would be 1.6 GB of pixels, with a true header."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it is decoded"))
    with pytest.raises(ImageError, match="Make it smaller"):
        decode(bomb)
    smaller = bomb.replace(header, struct.pack(">IIBBBBB", 10000, 4000, 8, 2, 0, 0, 0))
    with pytest.raises(ImageError, match=r"10000 x 4000 pixels; the most is 24000000"):
        decode(_with_sound_header(smaller))


def _with_sound_header(png: bytes) -> bytes:
    return png[:29] + struct.pack(">I", zlib.crc32(png[12:29])) + png[33:]


def test_a_damaged_image() -> None:
    content = encoded(size=(64, 64))
    with pytest.raises(ImageError, match=r"the image \(PNG\) is damaged"):
        decode(content[: len(content) // 2])


def test_data_urls() -> None:
    content = encoded()
    text = base64.b64encode(content).decode()
    assert from_url(f"data:image/png;base64,{text}") == content
    assert from_url(f"data:image/png;charset=utf-8;base64,{text}") == content
    for url, said in [
        ("http://example.org/a.png", "'http'; nothing is fetched"),
        ("https://example.org/a.png", "'https'; nothing is fetched"),
        ("file:///etc/passwd", "'file'; nothing is fetched"),
        ("/etc/passwd", "'no scheme'; nothing is fetched"),
        ("data:image/png,abc", "not in base64"),
        ("data:image/png;base64,???", "not valid base64"),
    ]:
        with pytest.raises(ImageError, match=said):
            from_url(url)


def test_limits_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MOST_BYTES", 1 << 20)
    path = tmp_path / "large.png"
    path.write_bytes(bytes((1 << 20) + 1))
    with pytest.raises(ImageError, match=r"large\.png has more than 1 MiB"):
        read_file(path)
    with pytest.raises(ImageError, match="more than 1 MiB"):
        from_base64("A" * (2 << 20))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.png"):
        read_image(str(tmp_path / "none.png"))


def test_all_images_of_a_prompt_share_a_limit_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "SEEN_PIXELS", 1000)
    pictures = [images.Picture(picture((100, 30))), images.Picture(picture((50, 20)))]
    sizes = [found.size for found in scaled(pictures)]
    assert sizes == [(50, 15), (25, 10)]
    assert scaled(pictures[1:])[0] is pictures[1].pixels


def test_the_content_of_a_message() -> None:
    assert with_images("so", 0) == "so"
    assert with_images("so", 2) == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "so"}]
