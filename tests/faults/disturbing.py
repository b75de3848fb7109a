"""Ctrl-C at any line of the streaming engine, and files that are changed while a model runs."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from interrupts import InterruptAt  # type: ignore[import-not-found]
from outcomes import outcome, say  # type: ignore[import-not-found]
from reading import MODEL, PROMPT, TOKENS, answer, loaded, mixture, models  # type: ignore[import-not-found]

import mlx_flash.flash
from mlx_flash import stream_generate
from mlx_flash.source.resolve import find_store

ENGINE = str(Path(mlx_flash.flash.__file__).parent)


def in_engine(path: str) -> bool:
    return path.startswith(ENGINE)


def interrupt(rng: random.Random, runs: int, work: Path) -> None:
    """Checks that the answer after an interrupted one is right."""
    for path, options in models(work, silent=False):
        model, tokenizer = loaded(path, **options)
        expected = answer(model, tokenizer)
        with InterruptAt(0, in_engine) as lines:
            answer(model, tokenizer)
        for _ in range(runs // 3):
            injected = False
            try:
                with InterruptAt(rng.randrange(1, lines.count), in_engine):
                    answer(model, tokenizer)
            except KeyboardInterrupt:
                injected = True
            say("interrupt", injected, *outcome(partial(answer, model, tokenizer), expected))
        model.flash.close()


def _rewrite(file: Path) -> None:
    data = bytearray(file.read_bytes())
    for i in range(len(data) // 8, len(data), 97):
        data[i] ^= 0x55
    with file.open("r+b") as out:
        out.write(data)


def _zero(file: Path) -> None:
    size = file.stat().st_size
    with file.open("r+b") as out:
        out.seek(size // 8)
        out.write(bytes(size - size // 8))


def _with_old_time(change: Callable[[Path], object], file: Path) -> None:
    status = file.stat()
    change(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def _replace(file: Path) -> None:
    other = file.with_suffix(".other")
    shutil.copy(file, other)
    other.replace(file)


CHANGES: dict[str, Callable[[Path], object]] = {
    "truncate": lambda file: os.truncate(file, file.stat().st_size // 2),
    "grow": lambda file: os.truncate(file, file.stat().st_size + 1),
    "rewrite": _rewrite,
    "rewrite, old time": partial(_with_old_time, _rewrite),
    "zeros, old time": partial(_with_old_time, _zero),
    "delete": Path.unlink,
    "rename away": lambda file: file.rename(file.with_suffix(".away")),
    "rename over": _replace,
    "chmod": lambda file: file.chmod(0o400),
}


def change(rng: random.Random, runs: int, work: Path) -> None:
    """Changes the file that the tokens are read from after the third token."""
    texts: dict[Path, list[int]] = {}
    for run in range(runs):
        name = list(CHANGES)[run % len(CHANGES)]
        source, read = [(find_store(MODEL), "neurons.bin"), (mixture(work), "model.safetensors")][
            run // len(CHANGES) % 2
        ]
        own = work / "own"
        shutil.rmtree(own, ignore_errors=True)
        shutil.copytree(source, own)
        if source not in texts:
            texts[source] = _tokens(own, lambda: None)
        say(name, True, *outcome(partial(_tokens, own, partial(CHANGES[name], own / read)), texts[source]))


def _tokens(folder: Path, after_three: Callable[[], object]) -> list[int]:
    """Loads the model again, so that its tokens must be read."""
    model, tokenizer = loaded(folder)
    try:
        tokens = []
        for response in stream_generate(model, tokenizer, PROMPT, max_tokens=TOKENS):
            tokens.append(response.token)
            if len(tokens) == 3:
                after_three()
        return tokens
    finally:
        model.flash.close()
