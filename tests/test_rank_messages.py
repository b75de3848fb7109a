"""What other processes send to a rank: wrong arrays, and bytes that come slowly."""

from __future__ import annotations

import socket
import struct
import threading
import time
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_flash.ranks import channel, messages, secret
from mlx_flash.ranks.arrays import packed, unpacked, unpacked_ids, unpacked_result
from mlx_flash.ranks.channel import Channel
from mlx_flash.ranks.follower import Follower, _call_in
from mlx_flash.ranks.group import Handlers
from mlx_flash.ranks.messages import BadMessageError

PATIENCE_S = 60.0


SIDES: list[Any] = [None, 1, "1", {}, [-1, -1], [1.0], [True], ["1"], [[1]], [None]]


@pytest.mark.parametrize(
    "forms",
    [
        *(None, {}, "float32", 1),
        *([None], [[]], [["float32"]], [["float32", [1], 1]], [["int8", [1]]], [[["float32"], [1]]], [[None, [1]]]),
        *([["float32", side]] for side in SIDES),
        *([["float32", side]] for side in ([2], [1 << 40], [0, 1 << 31], [1 << 31, 1 << 31])),
        *([], [["float32", [0]]], [["float16", [1]]], [["float32", []], ["float32", []]]),
    ],
)
def test_arrays_of_another_form_are_refused(forms: Any) -> None:
    with pytest.raises(BadMessageError, match=r"^a message between ranks (has|lacks) .*\.$"):
        unpacked(forms, bytearray(4))


@pytest.mark.parametrize("shape", [None, 2, [2], [-1, -1], ["1"], [1 << 62], [True]])
def test_ids_of_another_form_are_refused(shape: Any) -> None:
    with pytest.raises(BadMessageError, match="a message between ranks"):
        unpacked_ids(shape, bytearray(4))


@pytest.mark.parametrize("missing", ["call", "numbers", "shape", "arrays"])
def test_a_call_without_a_part_is_refused(missing: str) -> None:
    header = {"call": "x", "numbers": {}, "shape": [1], "arrays": []}
    assert _call_in(header, bytearray(4)).ids.tolist() == [0]
    with pytest.raises(BadMessageError, match="a message between ranks"):
        _call_in({name: part for name, part in header.items() if name != missing}, bytearray(4))


def test_arrays_arrive_as_they_were() -> None:
    sent = [mx.array(3.5), mx.zeros((0, 3), mx.float16), mx.arange(6).astype(mx.bfloat16).reshape(2, 3).T]
    forms, data = packed(sent)
    for one, other in zip(sent, unpacked(forms, data), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype and mx.array_equal(one, other).item()


def test_a_result_is_one_array() -> None:
    forms, data = packed([mx.zeros(2), mx.zeros(2)])
    with pytest.raises(BadMessageError, match="it returns 2 arrays"):
        unpacked_result(forms, data, (2,), None)


@pytest.mark.parametrize(
    ("result", "said"), [(mx.zeros(4, mx.int32), "int32, which is not sent"), (mx.zeros(5), "smaller --prefill-chunk")]
)
def test_a_result_that_cannot_be_sent_is_an_error(monkeypatch: pytest.MonkeyPatch, result: mx.array, said: str) -> None:
    monkeypatch.setattr(messages, "MOST_DATA", 16)
    follower: Any = object.__new__(Follower)
    one, other = socket.socketpair()
    with one, other:
        follower._channel, follower._number, follower.bytes_read = _Sender(one), 7, 0
        follower._handlers = Handlers()
        follower.reply(result)
        header, data = messages.receive(other)
    assert said in header.pop("error") and header == {"number": 7} and not data


class _Sender:
    """The sending half of a `Channel`."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, header: dict[str, Any], data: bytes = b"") -> None:
        messages.send(self._connection, header, data)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "claims 1195725856 + 790644820 bytes"),
        (struct.pack(">II", 11, 0) + b'{"beat":[]}', "a heartbeat of []"),
    ],
)
def test_what_cannot_be_read_ends_the_channel(sent: bytes, said: str) -> None:
    faults: list[str] = []
    one, other = _connected()
    with one, other:
        channel = Channel(one, faults.append)
        other.sendall(sent)
        with pytest.raises(EOFError):
            channel.take()
        _until(lambda: faults)
    assert said in faults[0] and not faults[0].endswith(".") and len(faults) == 1


def _connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        return one, server.accept()[0]


# -- bytes that come slowly ----------------------------------------------------------------------------------------


def test_a_part_of_a_long_message_is_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sender's heartbeat waits until the message has been sent."""
    monkeypatch.setattr(channel, "BEAT_S", 0.01)
    monkeypatch.setattr(channel, "SILENT_S", np.inf)
    faults: list[str] = []
    one, other = _connected()
    with one, other:
        peer = Channel(one, faults.append)
        peer._heard = 0.0  # long ago
        text = b'{"number": 1}'
        other.sendall(struct.pack(">II", len(text), 2) + text + b"a")
        _until(lambda: peer._heard > 0)
        other.sendall(b"b")
        assert peer.take() == ({"number": 1}, bytearray(b"ab"))
        peer.close()
    assert not faults


def test_a_greeting_that_comes_too_slowly_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret, "HELLO_S", 0.2)
    one, other = socket.socketpair()

    def drip() -> None:
        messages.receive(other)
        for each in messages.LENGTHS.pack(600, 0) + b"{" * 600:
            time.sleep(0.02)
            try:
                other.sendall(bytes([each]))
            except OSError:
                return

    with one, other:
        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(TimeoutError):
            secret.check(one, secret.new_secret(), 3)
        one.close()
        thread.join(PATIENCE_S)


def _until(true: Any) -> None:
    until = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < until
        time.sleep(0.001)
