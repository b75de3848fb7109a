"""systemd's side of a service, after systemd.service(5), systemd.syntax(7) and systemctl(1)."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import FlashError, UsageError
from .definition import Definition
from .system_manager import ServiceState, SystemManager, ran, why

UNIT = "mlxflash.service"
STOP_S = 20
FILES = 4096  # open files; mlx-lm wants so many
WORD = re.compile(r'"((?:[^"\\]|\\.)*)"')
ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t", "%": "%%"}
BACK = {"\\\\": "\\", '\\"': '"', "\\n": "\n", "\\t": "\t", "%%": "%", "$$": "$"}


def quoted(text: str, dollar: str = "$$") -> str:
    """A word in the syntax of units. dollar: "$" where systemd replaces no variables."""
    return '"' + "".join(ESCAPES.get(letter, letter) for letter in text).replace("$", dollar) + '"'


def unquoted(line: str) -> list[str]:
    """The words of a line that `quoted` wrote. Raises ValueError for an escape that it does not write."""
    try:
        return [re.sub(r"\\.|%%|\$\$", lambda found: BACK[found[0]], word) for word in WORD.findall(line)]
    except KeyError as error:
        raise ValueError(f"it has the escape {error}") from None


class Systemd(SystemManager):
    name = "systemd"
    starts = "when you log in, or with the machine after `loginctl enable-linger`"

    def __init__(self) -> None:
        config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        self.file = config / "systemd/user" / UNIT

    def text(self, definition: Definition) -> bytes:
        python, *words = definition.command()
        if found := set(python) & set("\"'\\"):
            raise UsageError(f"{python} has the character {min(found)}, and systemd starts no such program. Move it.")
        command = " ".join([quoted(python, "$"), *map(quoted, words)])
        environment = "\n".join(
            f"Environment={quoted(f'{name}={value}', '$')}" for name, value in definition.environment.items()
        )
        return f"""\
[Unit]
Description=mlx_flash: language models bigger than memory
StartLimitIntervalSec=600
StartLimitBurst=5

[Service]
Type=exec
ExecStart={command}
{environment}
WorkingDirectory=~
# Restarted after a crash only: a server that refuses to start would refuse again.
Restart=on-abnormal
RestartSec=10
TimeoutStopSec={STOP_S}
Nice=5
LimitNOFILE={FILES}
LimitCORE=0
UMask=0077
NoNewPrivileges=yes

[Install]
WantedBy=default.target
""".encode()

    def command_in(self, text: bytes) -> list[str]:
        found = re.search(r"^ExecStart=(.+)$", text.decode(errors="replace"), re.MULTILINE)
        if found is None:
            raise ValueError("it has no ExecStart")
        return unquoted(found[1])

    def start(self) -> None:
        self._do("daemon-reload")
        self._do("enable", UNIT)
        ran("systemctl", "--user", "reset-failed", UNIT)  # earlier crashes do not count
        try:
            self._do("restart", UNIT)
        except FlashError as error:
            if ended := self.state().ended:  # the message itself only says where to look
                raise FlashError(f"systemd does not start the service: {ended}.") from None
            raise error

    def stop(self) -> None:
        if self._properties().get("LoadState") == "loaded":
            self._do("stop", UNIT)

    def forget(self) -> None:
        ran("systemctl", "--user", "disable", UNIT)  # fails if nothing is left to be removed
        self._do("daemon-reload")
        ran("systemctl", "--user", "reset-failed", UNIT)

    def state(self) -> ServiceState:
        found = self._properties()
        pid = int(found.get("MainPID") or 0)
        if pid or found.get("ActiveState") == "inactive":
            return ServiceState(pid or None, "")
        result, code = found.get("Result", "unknown"), found.get("ExecMainStatus", "unknown")
        kind = "signal" if result in ("signal", "core-dump", "oom-kill") else "exit code"
        return ServiceState(None, f"{kind} {code} ({result}), restarted {found.get('NRestarts', '?')} times before")

    def _properties(self) -> dict[str, str]:
        """What systemd says about the unit; an unknown unit has a LoadState as well."""
        names = "LoadState,ActiveState,MainPID,Result,ExecMainStatus,NRestarts"
        done = self._do("show", f"--property={names}", UNIT)
        return dict(line.split("=", 1) for line in done.splitlines() if "=" in line)

    def _do(self, *words: str) -> str:
        done = ran("systemctl", "--user", *words)
        if done.returncode:
            raise FlashError(
                f"`systemctl --user {' '.join(words)}` failed: {why(done)}. A service needs a systemd for this user; "
                "without one, start `mlxflash server` by other means."
            )
        return done.stdout
