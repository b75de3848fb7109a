"""Starts, limits and ends the process that renders chat templates."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import weakref
from typing import Any

from ..errors import ChatTemplateError, ChatTemplateFailure
from ..source.children import child_environment

SECONDS = 10.0  # time limit of one rendering
MEMORY_BYTES = 128 << 20  # memory limit of one rendering, beyond its input; macOS does not enforce it
WAIT_SECONDS = 60.0  # time to wait for the renderings of other threads
WORKER = "mlx_flash.text.template_worker"

_Worker = subprocess.Popen[bytes]


class TemplateProcess:
    """Renders chat templates in another process. Any thread may use it; it does one rendering at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._finalizer: Any = None
        self._closed = threading.Event()

    def render(self, arguments: dict[str, Any], characters: int) -> str:
        """The text of one conversation from transformers' `render_jinja_template(**arguments)`.

        characters: its maximum length. Raises ChatTemplateFailure for errors of the template, ChatTemplateError if a
        limit is exceeded.
        """
        if not self._lock.acquire(timeout=WAIT_SECONDS):
            raise ChatTemplateError(
                f"other prompts kept the model's chat template busy for {WAIT_SECONDS:g} s. Try again."
            )
        try:
            answer = self._ask({"characters": characters, "arguments": arguments})
        finally:
            self._lock.release()
        if "text" in answer:
            return str(answer["text"])
        if "refused" in answer:
            raise ChatTemplateFailure(f"the model's chat template refuses: {answer['refused']}.")
        if "failed" in answer:
            raise ChatTemplateFailure(f"the model's chat template cannot be applied: {answer['failed']}.")
        raise ChatTemplateError(f"the model's chat template {answer['limit']}.")

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        """Ends the process, even during a rendering. That rendering and all later ones raise ChatTemplateError."""
        self._closed.set()
        if (worker := self._worker) is not None:
            worker.kill()
            with self._lock:
                self._end()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        line = json.dumps(request).encode() + b"\n"
        if self._worker is not None and self._worker.poll() is not None:  # It was killed while idle.
            self._end()
        worker = self._worker or self._start()
        assert worker.stdin is not None and worker.stdout is not None
        answer = b""
        try:
            with contextlib.suppress(OSError):  # The process has ended; the empty answer shows that below.
                worker.stdin.write(line)
                worker.stdin.flush()
                answer = worker.stdout.readline()
        except BaseException:  # such as a signal: the next request would get this one's answer
            self._end()
            raise
        if not answer.endswith(b"\n"):
            code = self._end()
            if code == -signal.SIGALRM:
                raise ChatTemplateError(f"the model's chat template did not end within {SECONDS:g} s.")
            raise ChatTemplateError(f"the process that applies the model's chat template ended with code {code}.")
        return dict(json.loads(answer))

    def _start(self) -> _Worker:
        if self._closed.is_set():
            raise ChatTemplateError("the chat template cannot be applied: this process is about to end.")
        try:
            # It gets its own process group, so that a Ctrl-C in the terminal does not reach it.
            worker = subprocess.Popen(
                [sys.executable, "-m", WORKER, str(SECONDS), str(MEMORY_BYTES)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                process_group=0,
                env=child_environment(),
            )
        except OSError as error:
            raise ChatTemplateError(f"the process that applies the chat template cannot be started: {error}.") from None
        self._worker, self._finalizer = worker, weakref.finalize(self, _end, worker)
        if self._closed.is_set():  # `close` was called meanwhile.
            worker.kill()
        assert worker.stdout is not None
        try:
            ready = worker.stdout.readline()
        except BaseException:
            self._end()
            raise
        if not ready:
            code = self._end()
            raise ChatTemplateError(
                f"the process that applies the chat template cannot be started: it ended with code {code}. "
                "Reinstall transformers and jinja2."
            )
        return worker

    def _end(self) -> int | None:
        """Kills the worker. Returns its exit code; None if there is no worker."""
        worker, self._worker = self._worker, None
        if worker is None:
            return None
        self._finalizer()
        return worker.returncode


def _end(worker: _Worker) -> None:
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        with contextlib.suppress(OSError):  # Closing writes what is still buffered, which fails.
            if pipe is not None:
                pipe.close()
