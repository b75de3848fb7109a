"""A conversion ends with the process that started it, no matter how that ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from serving import PATIENCE_S, until  # type: ignore[import-not-found]  # found beside this file
from tiny import make_checkpoint  # type: ignore[import-not-found]  # found beside this file


def test_a_conversion_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """The calibration text is a pipe that stays empty, so the conversion runs until it is stopped."""
    checkpoint, text, store = make_checkpoint(tmp_path / "checkpoint"), tmp_path / "text", tmp_path / "store"
    os.mkfifo(text)
    command = [sys.executable, "-m", "mlx_flash.convert", "--exit-with-stdin"]
    command += ["--model", str(checkpoint), "--output", str(store), "--calibration", str(text)]
    pipe = subprocess.PIPE
    opened: list[int] = []

    def is_read() -> bool:
        assert process.poll() is None, process.communicate()
        with contextlib.suppress(OSError):  # the pipe has no reader yet
            opened.append(os.open(text, os.O_WRONLY | os.O_NONBLOCK))
        return bool(opened)

    with subprocess.Popen(command, stdin=pipe, stderr=pipe, text=True) as process:
        try:
            until(is_read)
            assert process.stdin is not None and process.stderr is not None
            process.stdin.close()  # the kernel does this for a killed parent
            # The signal is SIGTERM, or SIGKILL after a while, which may happen on a busy processor.
            assert process.wait(PATIENCE_S) in (143, -signal.SIGKILL)
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
            for descriptor in opened:
                os.close(descriptor)
    assert not store.exists()
