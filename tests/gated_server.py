"""The server with generations that a test can hold: python gated_server.py ARGUMENTS-OF-THE-SERVER

The file that $MLX_FLASH_TEST_HOLD names has the number of tokens after which every generation stops. Without the file
none stops. A held generation continues when the number grows, the file is removed, its client leaves, or the server
ends.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

VARIABLE = "MLX_FLASH_TEST_HOLD"
COMMAND = [sys.executable, __file__]


def hold(file: Path, tokens: int | None) -> None:
    """Makes generations stop after so many tokens from now on; None: they do not stop."""
    if tokens is None:
        file.unlink(missing_ok=True)
    else:
        file.with_suffix(".new").write_text(str(tokens))
        file.with_suffix(".new").replace(file)


def held_after() -> int | None:
    with contextlib.suppress(FileNotFoundError):
        return int(Path(os.environ[VARIABLE]).read_text())
    return None


def main(arguments: argparse.Namespace) -> int:
    import mlx_flash.server.engine
    from mlx_flash.server.__main__ import main as serve
    from mlx_flash.text import prompt_cache

    real_engine, real_generate = mlx_flash.server.engine.Engine, prompt_cache.stream_generate
    engines: list[Any] = []

    def engine(*arguments: Any) -> Any:
        engines.append(real_engine(*arguments))
        return engines[0]

    def is_held(made: int) -> bool:
        after = held_after()
        (own,) = engines
        return after is not None and made >= after and not own._stopping and not own.running[0].left

    def stream_generate(*arguments: Any, **options: Any) -> Generator[Any]:
        for response in real_generate(*arguments, **options):
            yield response
            while is_held(response.generation_tokens):
                time.sleep(0.01)

    mlx_flash.server.engine.Engine = engine  # type: ignore[misc, assignment]
    prompt_cache.stream_generate = stream_generate
    return serve(arguments)


if __name__ == "__main__":
    from mlx_flash.cli.run import run_command
    from mlx_flash.server.__main__ import make_parser

    run_command(make_parser(), main, terminated=0)
