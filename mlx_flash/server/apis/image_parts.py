"""Images in the messages of every API: parts of a content, which the chat template sees as marks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...errors import ImageError
from ..api_errors import ApiError

KIND = "image"


def image_part(content: bytes) -> dict[str, Any]:
    """A part of a content: an image's file."""
    return {"type": KIND, "file": content}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def read(how: Callable[[str], bytes], given: str, param: str) -> bytes:
    """The bytes of an image that a request gives, read by `how`. Raises ApiError."""
    try:
        return how(given)
    except ImageError as error:
        raise ApiError(400, str(error), param=param, code="invalid_image") from None


def joined(first: Any, second: Any) -> Any:
    """The content of two messages that become one: a text, or parts if one of them has images."""
    if isinstance(first, str) and isinstance(second, str):
        return "\n\n".join(filter(None, (first, second)))
    return [part for content in (first, second) for part in _parts(content)]


def _parts(content: Any) -> list[dict[str, Any]]:
    return ([text_part(content)] if content else []) if isinstance(content, str) else content


def taken_out(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[bytes]]:
    """(the messages with marks in place of images, the images' files in order)."""
    files: list[bytes] = []
    marked = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            files += [part["file"] for part in content if part["type"] == KIND]
            content = [{"type": KIND} if part["type"] == KIND else part for part in content]
            message = message | {"content": content}
        marked.append(message)
    return marked, files
