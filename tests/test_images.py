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


def noise(size: tuple[int, int], kind: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    """An image whose halves differ, with some noise."""
    numbers = np.random.default_rng(1).integers(0, 60, (size[1], size[0], len(mode)), np.uint8)
    numbers[:, : size[0] // 2] += 150
    file = io.BytesIO()
    Image.fromarray(numbers, mode).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_large_image_is_never_converted_as_a_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "SEEN_PIXELS", 600)
    monkeypatch.setattr(images, "BAND_PIXELS", 1000)
    content = noise((130, 97), mode=mode)
    sizes, convert = [], Image.Image.convert

    def noting(pixels: Any, *arguments: Any, **options: Any) -> Any:
        sizes.append(pixels.width * pixels.height)
        return convert(pixels, *arguments, **options)

    monkeypatch.setattr(Image.Image, "convert", noting)
    found = decode(content).pixels
    assert sizes and max(sizes) <= 1000
    monkeypatch.undo()
    whole = Image.open(io.BytesIO(content))
    behind = Image.new("RGBA", whole.size, "white")
    whole = Image.alpha_composite(behind, whole.convert("RGBA")).convert("RGB").resize(found.size)
    assert found.mode == "RGB" and 500 < found.width * found.height <= 600
    assert np.abs(np.asarray(found, np.int32) - np.asarray(whole, np.int32)).mean() < 8


def test_a_large_photo_is_decoded_in_a_smaller_size_and_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "SEEN_PIXELS", 1000)
    turned = Image.Exif()
    turned[0x0112] = 6  # its right side is its top
    content = noise((400, 160), "JPEG", exif=turned)
    sizes, on_white = [], images._on_white

    def noting(pixels: Any) -> Any:
        sizes.append(pixels.size)
        return on_white(pixels)

    monkeypatch.setattr(images, "_on_white", noting)
    found = decode(content).pixels
    assert sizes == [(50, 20)]
    assert found.size == (20, 50)
    assert np.asarray(found)[:20].mean() > np.asarray(found)[-20:].mean() + 100


@pytest.mark.parametrize(("kind", "mode", "most"), [("WEBP", "RGB", 37), ("JPEG", "CMYK", 75), ("JPEG", "RGB", 100)])
def test_formats_whose_decoding_takes_more_have_fewer_pixels(
    kind: str, mode: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "DECODED_BYTES", 600)

    def made(pixels: int) -> bytes:
        file = io.BytesIO()
        Image.new(mode, (pixels, 1)).save(file, kind)
        return file.getvalue()

    assert decode(made(most)).pixels.size == (most, 1)
    with pytest.raises(
        ImageError, match=rf"the most is {most} for {kind if mode == 'RGB' else mode}\. Make it smaller"
    ):
        decode(made(most + 1))


def test_the_longest_side() -> None:
    assert decode(encoded(size=(1, images.MOST_SIDE))).pixels.size == (1, images.MOST_SIDE)
    with pytest.raises(ImageError, match=r"16385 x 2 pixels; the longest side is 16384"):
        decode(encoded(size=(images.MOST_SIDE + 1, 2)))
