"""The server, with generations that a test can hold: python gated_server.py ARGUMENTS-OF-THE-SERVER

A line of standard input says at which token every generation stops ("8"), or that none does ("-"); each is answered by
a line of standard output. A held one continues when the number grows, when its client leaves, or when the server ends.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from typing import Any

from mlx_flash import turns
from mlx_flash.commands import run_command
from mlx_flash.server import __main__ as command
from mlx_flash.server.engine import Engine

changed = threading.Condition()
held_at: int | None = None
engines: list[Engine] = []


class Recorded(Engine):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        engines.append(self)


def obey() -> None:
    global held_at
    for line in sys.stdin:
        with changed:
            held_at = None if line == "-\n" else int(line)
            changed.notify_all()
        print("held", flush=True)


def may_go_on(made: int) -> bool:
    (engine,) = engines
    return held_at is None or made < held_at or engine._stopping or engine.job is None or engine.job.left


real = turns.stream_generate


def stream_generate(*arguments: Any, **options: Any) -> Iterator[Any]:
    for response in real(*arguments, **options):
        yield response
        with changed:
            # A client that leaves does not wake it: looked for ten times a second.
            while not may_go_on(response.generation_tokens):
                changed.wait(0.1)


if __name__ == "__main__":
    import mlx_flash.server.engine

    mlx_flash.server.engine.Engine = Recorded  # type: ignore[misc]
    turns.stream_generate = stream_generate
    threading.Thread(target=obey, daemon=True).start()
    run_command(command.make_parser(), command.main)
