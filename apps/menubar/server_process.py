"""Runs the server in a separate process. MLX aborts when memory runs out, and that must not end the app."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import IO

from mlx_flash.cli.stopping import LIFELINE_S
from mlx_flash.defaults import KEY_VARIABLE
from mlx_flash.source.children import child_environment

ADDRESS = re.compile(r"\bhttp://\S+")  # in the line that the server prints once its port is open
KEPT_LINES = 40  # lines of standard error that are kept
# The signals that the system or MLX sends when memory runs out, on macOS and on Linux.
MEMORY_SIGNALS = {signal.SIGKILL, signal.SIGABRT}


def server_command(model: str | None, memory: int | None) -> list[str]:
    """The command that runs the server.

    model: a folder or a Hugging Face id; None for the demo model. memory: bytes; None for a share of free memory.
    """
    command = [sys.executable, "-m", "mlx_flash.server", "--port", "0", "--exit-with-stdin"]
    if model is not None:
        command += ["--model", model]
    if memory is not None:
        command += ["--memory", f"{memory}B"]
    return command


class EngineProcess:
    """One run of the server."""

    def __init__(self, command: Sequence[str]) -> None:
        """Starts the process, which ends when its standard input does (`mlx_flash.cli.stopping`). Raises OSError."""
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        # It gets its own process group, so that its children (a conversion) can be ended with it.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,  # "\r" ends a line as well, as in progress bars.
            errors="replace",
            # A key meant for another server would lock the app out of its own.
            env={name: value for name, value in child_environment().items() if name != KEY_VARIABLE},
            start_new_session=True,
        )
        self._threads: list[threading.Thread] = []

    def watch(
        self,
        on_listening: Callable[[str], None],
        on_line: Callable[[str], None],
        on_end: Callable[[int], None],
    ) -> None:
        """Starts threads that report on the process. Call it once.

        Args:
            on_listening: called with the address once the port is open.
            on_line: called with every line of its standard error.
            on_end: called once, as the last, with the exit code or the negative number of the signal that ended it.
        """
        out, err = self._process.stdout, self._process.stderr
        assert out is not None and err is not None
        readers = [
            threading.Thread(target=_read_output, args=(out, on_listening), daemon=True),
            threading.Thread(target=_read_errors, args=(err, self.lines, on_line), daemon=True),
        ]
        self._threads = [*readers, threading.Thread(target=self._wait, args=(readers, on_end), daemon=True)]
        for thread in self._threads:
            thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self, grace_seconds: float = LIFELINE_S) -> None:
        """Ends the process, and waits until it and all its children are gone."""
        self._process.terminate()
        try:
            self._process.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            self._kill_group()
        for thread in self._threads:
            thread.join()

    def _kill_group(self) -> None:
        # macOS raises PermissionError for a group of dead processes.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _wait(self, readers: Sequence[threading.Thread], on_end: Callable[[int], None]) -> None:
        code = self._process.wait()
        self._kill_group()  # Remaining children would hold the pipes open and outlive the app.
        for reader in readers:
            reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()
        on_end(code)


def _read_output(stream: IO[str], on_listening: Callable[[str], None]) -> None:
    for line in stream:
        if found := ADDRESS.search(line):
            on_listening(found[0].rstrip("/."))


def _read_errors(stream: IO[str], lines: deque[str], on_line: Callable[[str], None]) -> None:
    for line in stream:
        if line := line.rstrip():
            lines.append(line)
            on_line(line)


def why_it_ended(code: int, lines: Sequence[str], what: str = "The engine") -> str:
    """A sentence that says why the engine, or another process, ended.

    code: the exit code, or the negative number of the signal. lines: the last lines of standard error. what: the
    process, as the beginning of a sentence.
    """
    said = _last_sentence(lines)
    if code >= 0:
        return said or f"{what} ended with exit code {code} and without a message."
    number = -code
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number in MEMORY_SIGNALS:
        return f"{what} was ended by {name}. Out of memory? Choose a smaller budget, or close other programs."
    return f"{what} was ended by {name}." + (f" Its last message: {said}" if said else "")


def _last_sentence(lines: Sequence[str]) -> str:
    """The last line with a message, without the name of its command; "" if there is none."""
    for line in reversed(lines):
        if text := re.sub(r"^(usage:.*|python -m \S+: (error: )?)", "", line.strip()):
            return text
    return ""
