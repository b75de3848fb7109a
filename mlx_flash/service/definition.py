"""What the system starts, and where the service's files lie."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import FlashError, UsageError

STARTER = "mlx_flash.service.start"
# The system does not start a service with the shell's variables. These say where models are.
PASSED_ON = ("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "MLX_FLASH_CACHE", "XDG_CACHE_HOME")
FOLDERS = ("HF_HOME", "HF_HUB_CACHE", "MLX_FLASH_CACHE", "XDG_CACHE_HOME")
# A property list would change a carriage return and cannot hold the others, nor half a character.
UNWRITABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
HOMEBREW = re.compile(r"(?P<brew>.+)/Cellar/(?P<formula>[^/]+)/[^/]+/(?P<rest>.+)")


@dataclass(frozen=True)
class ServiceFiles:
    """log: the service's output. key: the API key, in a file that only this user reads."""

    log: Path
    key: Path


def places() -> ServiceFiles:
    """Raises FlashError if this user has no home folder."""
    try:
        home = Path.home()
    except RuntimeError:
        raise FlashError("this user has no home folder, so there is no place for a service.") from None
    if sys.platform == "darwin":
        library = home / "Library"
        return ServiceFiles(
            library / "Logs/mlx_flash/server.log", library / "Application Support/mlx_flash/service-key"
        )
    state = Path(os.environ.get("XDG_STATE_HOME") or home / ".local/state")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    return ServiceFiles(state / "mlx_flash/server.log", config / "mlx_flash/service-key")


@dataclass(frozen=True)
class Definition:
    """python: the interpreter's absolute path. flags: the server's. key: whether there is a file with the API key."""

    python: str
    flags: tuple[str, ...]
    environment: Mapping[str, str]
    places: ServiceFiles
    key: bool = False

    def command(self) -> list[str]:
        key = [f"--key={self.places.key}"] if self.key else []
        return [self.python, "-m", STARTER, f"--log={self.places.log}", *key, "--", *self.flags]

    def check(self) -> None:
        """Raises UsageError for a text that a definition cannot hold."""
        for text in (*self.command(), *(f"{name}={value}" for name, value in self.environment.items())):
            if found := UNWRITABLE.search(text):
                raise UsageError(
                    f"{text!r:.80} has the character {found[0]!r}, which the definition of a service cannot hold. "
                    "Rename the file or folder, or leave the character out."
                )


def flags_in(command: Sequence[str]) -> list[str]:
    """The server's flags in a command of `Definition`. Raises ValueError if it is another command."""
    if STARTER not in command:
        raise ValueError(f"it does not start {STARTER}")
    return list(command[command.index("--") + 1 :])


def environment_of(shell: Mapping[str, str]) -> dict[str, str]:
    """The variables for the service. shell: those of this process."""
    passed = {name: shell[name] for name in PASSED_ON if shell.get(name)}
    whole = {name: os.path.abspath(Path(passed[name]).expanduser()) for name in FOLDERS if name in passed}
    return {**passed, **whole, "PYTHONSAFEPATH": "1"}


def lasting_python(executable: str) -> str:
    """The path by which an interpreter is found after an upgrade of the package.

    Environments of pip, pipx and uv stay where they are. Homebrew's folder has the version in its path, and a link
    beside it, which lasts. The links of an environment are not followed: they make it this environment.

    Raises FlashError for an interpreter that is not a file, as in a packaged app.
    """
    if not executable or not Path(executable).is_file():
        raise FlashError("this Python does not know its own path. Install mlx-flash-runtime with pipx, uv or pip.")
    path = os.path.abspath(executable)
    if found := HOMEBREW.fullmatch(path):
        link = Path(found["brew"], "opt", found["formula"], found["rest"])
        if link.exists() and link.samefile(path):
            return str(link)
    return path
