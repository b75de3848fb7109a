"""A process that answers in lines of JSON. Slow or heavy work is done in such processes, never in the app's own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from typing import IO, Any

from mlx_flash.source.children import child_environment

from .server_process import why_it_ended

GRACE_SECONDS = 3.0  # time to end by itself
KEPT_LINES = 20


class ProcessFailed(Exception):
    """The sentence with which a process ended."""


class JsonProcess:
    """`python -m MODULE ARGUMENTS`, which ends when its standard input closes. Raises OSError."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=child_environment(HF_HUB_DISABLE_PROGRESS_BARS="1"),
        )
        self._errors: deque[str] = deque(maxlen=KEPT_LINES)
        self._stopped = False
        assert self._process.stderr is not None
        self._reader = threading.Thread(target=_collect, args=(self._process.stderr, self._errors), daemon=True)
        self._reader.start()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The objects that the process prints, as they come. Raises ProcessFailed, unless it was stopped."""
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                try:
                    value = json.loads(line)
                except ValueError:
                    continue
                if isinstance(value, dict):
                    yield value
        code = self._ended()
        if code and not self._stopped:
            raise ProcessFailed(why_it_ended(code, self._errors, "The process"))

    def stop(self) -> None:
        """Ends the process, and waits until it is gone. Another thread may iterate over it."""
        self._stopped = True
        self._process.terminate()
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ended(self) -> int:
        code = self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stderr):
            assert stream is not None
            stream.close()
        return code


def _collect(stream: IO[str], lines: deque[str]) -> None:
    for line in stream:
        if line := line.strip():
            lines.append(line)
