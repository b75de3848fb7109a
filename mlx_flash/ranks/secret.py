"""How both ends of a control connection prove that they know the secret, without sending it."""

from __future__ import annotations

import hmac
import secrets
import socket
import time

from .messages import MOST_HELLO, BadMessageError, receive, send

HELLO_S = 5.0  # until the secret has been checked


def new_secret() -> str:
    return secrets.token_hex(32)


def greet(connection: socket.socket, secret: str, rank: int) -> None:
    """The connecting rank's side. Raises OSError, EOFError, BadMessageError."""
    connection.settimeout(HELLO_S)
    theirs, _ = receive(connection, MOST_HELLO, 0)
    own = secrets.token_hex(16)
    send(connection, {"rank": rank, "nonce": own, "proof": _proof(secret, f"{rank} {theirs.get('nonce')}")})
    answer, _ = receive(connection, MOST_HELLO, 0)
    if not _equal(answer.get("proof"), _proof(secret, f"0 {own}")):
        raise BadMessageError("what answers in place of rank 0 does not know the secret.")
    connection.settimeout(None)


def check(connection: socket.socket, secret: str, size: int) -> int:
    """Rank 0's side. Returns the rank that connects. Raises OSError, EOFError, BadMessageError."""
    connection.settimeout(HELLO_S)
    until = time.monotonic() + HELLO_S

    def in_time() -> None:  # also for one who sends a byte now and then
        if time.monotonic() > until:
            raise TimeoutError

    own = secrets.token_hex(16)
    send(connection, {"nonce": own})
    hello, _ = receive(connection, MOST_HELLO, 0, in_time)
    rank = hello.get("rank")
    if type(rank) is not int or not 0 < rank < size or not _equal(hello.get("proof"), _proof(secret, f"{rank} {own}")):
        raise BadMessageError("a connection does not come from a rank of this group.")
    send(connection, {"proof": _proof(secret, f"0 {hello.get('nonce')}")})
    connection.settimeout(None)
    return rank


def _proof(secret: str, text: str) -> str:
    return hmac.digest(bytes.fromhex(secret), text.encode(errors="replace"), "sha256").hex()


def _equal(given: object, expected: str) -> bool:
    return isinstance(given, str) and given.isascii() and hmac.compare_digest(given, expected)
