"""Runs a command in a pseudo-terminal, where a test types, reads, and presses Ctrl-C like a user."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from pathlib import Path

# A separate process takes the terminal and then becomes the command, so that no test code runs after a fork.
LAUNCH = (
    "import os, signal, sys; os.login_tty(0); signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
ESCAPES = re.compile(r"\x1b\[[?0-9;]*[A-Za-z]|\r|\x07")
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


class PseudoTerminal:
    def __init__(self, *arguments: str, cache: Path, **variables: str) -> None:
        """Starts Python with the arguments. cache: its cache folder. variables: of its environment."""
        self._own, other = pty.openpty()
        termios.tcsetwinsize(other, (50, 20_000))  # wide enough that no line is broken
        environment = {**os.environ, "TERM": "xterm", "MLX_FLASH_CACHE": str(cache), **variables}
        command = [sys.executable, "-c", LAUNCH, *arguments]
        self.process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env=environment)
        os.close(other)
        self._unread = ""
        self.raw = ""  # all output, with its escape sequences

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def press(self, key: str) -> None:
        self.let_draw()
        self.type(key)

    def press_at_prompt(self, key: str) -> None:
        self.let_wait()
        self.type(key)

    def let_draw(self) -> None:
        """Waits, because readline misses a signal while it draws or returns a line."""
        time.sleep(1)

    def let_wait(self) -> None:
        """Waits until the command, which has shown its prompt, only waits for a key at several looks in a row."""
        if not sys.platform.startswith("linux"):  # other systems show a waiting process as running
            self.let_draw()
            return
        looks = 0
        while looks < 10:
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            looks = looks + 1 if state == "S" else 0
            time.sleep(0.01)

    def until(self, text: str, seconds: float = 600) -> str:
        """Returns the output up to `text` without escape sequences. Fails if it does not come or the command ends."""
        end = time.monotonic() + seconds
        while text not in (shown := ESCAPES.sub("", self._unread)):
            if not self._read(end - time.monotonic()):
                raise AssertionError(f"{text!r} did not come, but {shown!r}")
        at = shown.index(text) + len(text)
        self._unread = shown[at:]
        return shown[:at]

    def until_something(self) -> None:
        """Waits for new output. The escape sequences that readline sends to end a line do not count."""
        while not ESCAPES.sub("", self._unread).strip():
            self.read()

    def ended(self, seconds: float = 600) -> tuple[int, str]:
        """(exit code, the rest of the output)"""
        end = time.monotonic() + seconds
        while self._read(end - time.monotonic()):
            pass
        return self.process.wait(timeout=max(0.1, end - time.monotonic())), ESCAPES.sub("", self._unread)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._own)

    def read(self) -> None:
        """Reads one more piece of output."""
        assert self._read(600), "nothing came"

    def _read(self, seconds: float) -> bool:
        if seconds <= 0 or not select.select([self._own], [], [], seconds)[0]:
            return False
        try:
            piece = os.read(self._own, 65536).decode(errors="replace")
        except OSError:  # Linux raises this when the command has ended
            return False
        self._unread += piece
        self.raw += piece
        return bool(piece)
