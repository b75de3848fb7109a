"""Starts the process of another rank, on this machine or over ssh, and keeps what it prints."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import FlashError
from .hosts import RankHost

MODULE = "mlx_flash.rank"
SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
KILLING_S = 1.0
ENDING_S = 3.0
KEPT_LINES = 20
NOT_FOUND = 127  # the exit code of a shell and of env, for a command that is not there
NO_PYTHON = 'install mlx-flash-runtime there, and name its Python as "python" in the host file'

Wrap = Callable[[int, list[str]], list[str]]


class RankProcess:
    """setup: what the rank must know, with the secret. It goes through standard input, so that no list of processes
    shows it. wrap: (rank, command) -> the command to start instead, such as one that limits its memory."""

    def __init__(
        self,
        rank: int,
        host: RankHost,
        setup: dict[str, Any],
        say: Callable[[str], None],
        environment: Mapping[str, str],
        wrap: Wrap | None = None,
    ) -> None:
        """Raises FlashError."""
        self.name = name_of(rank, host)
        self._say = say
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        command = rank_command(host)
        if wrap is not None:
            command = wrap(rank, command)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C is for rank 0, which ends the others.
            )
        except OSError as error:
            raise FlashError(f"{self.name} cannot be started: {command[0]}: {error.strerror}.") from None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # It has ended already; `ended` tells.
            self._process.stdin.write(json.dumps(setup).encode() + b"\n")
            self._process.stdin.close()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def ended(self, wait_s: float) -> str | None:
        """A clause with what it printed last, if the process has ended or ends within `wait_s`."""
        try:
            self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(1)
        if (code := self._process.returncode) < 0:  # What it printed before does not tell why.
            return f"{self.name} was ended by {_name_of(-code)}"
        last = self._lines[-1].removesuffix(".") if self._lines else "it printed nothing"
        advice = f" ({NO_PYTHON})" if code == NOT_FOUND or "No module named" in last else ""
        return f"{self.name} ended with code {code}: {last}{advice}"

    def finish(self, wait_s: float) -> None:
        """Waits for its end, and kills it after `wait_s`."""
        try:
            self._process.wait(max(0.0, wait_s))
        except subprocess.TimeoutExpired:
            self.kill()
        self._reader.join(1)

    def kill(self) -> None:
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # It waits for a disk that does not answer.
            self._process.wait(KILLING_S)

    @property
    def pid(self) -> int:
        """Of the process on this machine, which is ssh for a rank elsewhere."""
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            for line in stream:
                text = line.decode(errors="replace").rstrip()
                if text:
                    self._lines.append(text)
                    self._say(f"{self.name}: {text}")


def name_of(rank: int, host: RankHost) -> str:
    return f"rank {rank} ({host.ssh})"


def rank_command(host: RankHost) -> list[str]:
    """The command that starts a rank there."""
    command = [host.python or sys.executable, "-m", MODULE]
    if host.local:
        return ["env", *host.variables, *command] if host.variables else command
    return [*SSH, "--", host.ssh, shlex.join(["env", "PYTHONSAFEPATH=1", *host.variables, *command])]


def _name_of(number: int) -> str:
    """The name of a signal, or its number if it has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
