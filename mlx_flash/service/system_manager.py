"""What the service needs of the program that starts it: launchd or systemd."""

from __future__ import annotations

import abc
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ..errors import FlashError
from .definition import Definition

WAIT_S = 60.0  # for launchctl or systemctl


@dataclass(frozen=True)
class ServiceState:
    """pid: None if it does not run. ended: how it ended, in the system's words; "" if that is not known."""

    pid: int | None
    ended: str


class SystemManager(abc.ABC):
    """file: where the definition lies. starts: when a service is started, a clause."""

    name: str
    starts: str
    file: Path

    @abc.abstractmethod
    def text(self, definition: Definition) -> bytes:
        """The contents of `file`."""

    @abc.abstractmethod
    def command_in(self, text: bytes) -> list[str]:
        """The command in the contents of `file`. Raises ValueError if there is none."""

    @abc.abstractmethod
    def start(self) -> None:
        """Starts what `file` says, now and at every login, in place of what runs. Raises FlashError."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Ends the service and waits for its end. Raises FlashError."""

    def forget(self) -> None:  # noqa: B027  # launchd remembers nothing of a file that is gone
        """Called after `file` was removed: it is not started at a login any more. Raises FlashError."""

    @abc.abstractmethod
    def state(self) -> ServiceState:
        """Raises FlashError if the system does not say."""


def ran(*command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of the system. Raises FlashError if it cannot be started or does not end."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=WAIT_S
        )
    except FileNotFoundError:
        raise FlashError(
            f"{command[0]} is not installed here, and it is what starts services. Start `mlxflash server` by other "
            "means."
        ) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FlashError(f"`{' '.join(command)}` failed: {error}.") from None


def why(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that a failed command said, or its exit code."""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1].strip().rstrip(".") if lines else f"exit code {done.returncode}"
