"""Messages on the control channel: a header in JSON, and raw bytes.

4 bytes  length of the header, big-endian
4 bytes  length of the data
header   an object in JSON, UTF-8
data
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from typing import Any

from ..errors import FlashError

LENGTHS = struct.Struct(">II")
MOST_HEADER = 4 << 20  # bytes
MOST_DATA = 1 << 30  # bytes; the outputs for a chunk of a prompt take hundreds of MB with the largest models
MOST_HELLO = 1024  # bytes of a header before the secret is checked


class BadMessageError(FlashError):
    """Bytes that are not a message, or a message above the limits."""


Message = tuple[dict[str, Any], bytearray]


def send(connection: socket.socket, header: dict[str, Any], data: bytes = b"") -> None:
    """Raises OSError, BadMessageError."""
    text = json.dumps(header).encode()
    if len(text) > MOST_HEADER or len(data) > MOST_DATA:
        raise BadMessageError(
            f"a message between ranks of {len(text)} + {len(data)} bytes is too long. Use a smaller --prefill-chunk."
        )
    connection.sendall(LENGTHS.pack(len(text), len(data)) + text + data)


def receive(
    connection: socket.socket,
    most_header: int = MOST_HEADER,
    most_data: int = MOST_DATA,
    heard: Callable[[], None] = lambda: None,
) -> Message:
    """The next (header, data). heard: called whenever some bytes have come.

    Raises EOFError at the end of the connection, OSError, BadMessageError.
    """
    header_bytes, data_bytes = LENGTHS.unpack(_exactly(connection, LENGTHS.size, heard))
    if header_bytes > most_header or data_bytes > most_data:
        raise BadMessageError(f"a message between ranks claims {header_bytes} + {data_bytes} bytes.")
    text = _exactly(connection, header_bytes, heard)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise BadMessageError("the header of a message between ranks is not an object in JSON.")
    return header, _exactly(connection, data_bytes, heard)


def _exactly(connection: socket.socket, count: int, heard: Callable[[], None]) -> bytearray:
    found = bytearray(count)
    left = memoryview(found)
    while left:
        received = connection.recv_into(left)
        if not received:
            raise EOFError
        heard()
        left = left[received:]
    return found
