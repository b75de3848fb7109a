"""Faults in the files that a conversion reads, writes and syncs, and conversions that are killed."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path

from faults import VISIBLE, WRITES  # type: ignore[import-not-found]
from outcomes import inject, outcome, say  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.convert.conversion import Settings, convert
from mlx_flash.flash.files import is_store


def _checkpoint(work: Path) -> Path:
    from conftest import write_tokenizer  # type: ignore[import-not-found]
    from tiny import make_checkpoint  # type: ignore[import-not-found]

    folder: Path = make_checkpoint(work / "checkpoint", neurons=256)
    write_tokenizer(folder)
    return folder


def _contents(store: Path) -> dict[str, int]:
    """File -> checksum. A disturbed conversion must give the same bytes as an undisturbed one."""
    return {path.name: zlib.crc32(path.read_bytes()) for path in sorted(store.iterdir())}


def _remove(store: Path, rng: random.Random) -> None:
    """Removes the output. In half of the cases an unfinished conversion stays, to be resumed."""
    shutil.rmtree(store, ignore_errors=True)
    if rng.random() < 0.5:
        shutil.rmtree(store.with_name(f"{store.name}.partial"), ignore_errors=True)


def _convert(checkpoint: Path, store: Path) -> dict[str, int]:
    # A short text, because reading the whole packaged text takes as long as the rest.
    text = checkpoint.with_name("calibration.txt")
    text.write_text("It was a dark night, and the wind went over the hills. " * 10)
    settings = Settings(calibration_text=text, calibration_tokens=128, predictor_memory=1 << 20)
    with contextlib.redirect_stderr(io.StringIO()):
        convert(checkpoint, store, settings)
    return _contents(store)


def disturbed(rng: random.Random, runs: int, work: Path, kinds: tuple[str, ...], calls: str, where: str) -> None:
    """where: a part of the paths whose calls are hit. After an error the same command runs again, as for a user."""
    checkpoint, store = _checkpoint(work), work / "store"
    action = partial(_convert, checkpoint, store)
    expected = action()
    inject(rng, runs, kinds, calls, f"{work}/{where}", expected, action, before=partial(_remove, store, rng))


checkpoint_reads = partial(disturbed, kinds=VISIBLE, calls="read", where="checkpoint/")
partial_reads = partial(disturbed, kinds=VISIBLE, calls="read", where="store.partial/")
writes = partial(disturbed, kinds=WRITES, calls="write", where="store.partial/")
syncs = partial(disturbed, kinds=("eio",), calls="sync", where="store.partial")


def kill(rng: random.Random, runs: int, work: Path) -> None:
    """Stops the conversion at random moments, up to three times, and then lets it finish."""
    checkpoint, store = _checkpoint(work), work / "store"
    command = [sys.executable, "-m", "mlx_flash.convert", "--model", str(checkpoint), "--output", str(store)]
    command += ["--calibration-tokens", "512"]
    began = time.monotonic()
    _run(command, None, signal.SIGTERM)
    whole_s, expected = time.monotonic() - began, _contents(store)
    for _ in range(runs):
        shutil.rmtree(store, ignore_errors=True)
        shutil.rmtree(store.with_name("store.partial"), ignore_errors=True)
        numbers = [rng.choice((signal.SIGINT, signal.SIGTERM, signal.SIGKILL)) for _ in range(rng.randrange(1, 4))]
        moments = [(rng.random() * whole_s, number) for number in numbers]
        result, detail = outcome(partial(_interrupted, command, store, moments), expected)
        say(" ".join(number.name for number in numbers), True, result, detail)


def _interrupted(command: list[str], store: Path, moments: list[tuple[float, signal.Signals]]) -> dict[str, int]:
    for seconds, number in moments:
        if _run(command, seconds, number) == 0 or is_store(store):  # the signal may come after everything is done
            return _contents(store)
    _run(command, None, signal.SIGTERM)
    return _contents(store)


def _run(command: list[str], seconds: float | None, number: signal.Signals) -> int:
    """Runs a command and sends it the signal after `seconds`, if given. Returns the exit code."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
        if seconds is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(seconds)
            child.send_signal(number)
        _, errors = child.communicate(timeout=240)
    ours = f"{Path(mlx_flash.__file__).parent}{os.sep}"  # a traceback from before its first line is Python's own
    if ("Traceback" in errors and ours in errors) or (seconds is None and child.returncode):
        raise RuntimeError(f"exit code {child.returncode}: {errors[max(0, errors.find('Traceback') - 100) :][:900]}")
    return child.returncode
