"""launchd's side of a service, after launchd.plist(5) and launchctl(1). NOT RUN on a Mac: tested with a script."""

from __future__ import annotations

import os
import plistlib
import re
import time
from pathlib import Path
from xml.parsers.expat import ExpatError

from ..errors import FlashError
from .definition import Definition
from .system_manager import ServiceState, SystemManager, ran, why

LABEL = "io.github.mlx-flash.server"
GONE_S = 30.0  # a stop takes up to STOP_S, after which launchd kills
STOP_S = 20
PAUSE_S = 60  # between two starts, at least
FILES = 4096  # open files; launchd allows 256, and mlx-lm wants 4096


class Launchd(SystemManager):
    name = "launchd"
    starts = "when you log in"

    def __init__(self) -> None:
        self.file = Path.home() / "Library/LaunchAgents" / f"{LABEL}.plist"
        self._domain = f"gui/{os.getuid()}"

    def text(self, definition: Definition) -> bytes:
        return plistlib.dumps(
            {
                "Label": LABEL,
                "ProgramArguments": definition.command(),
                "EnvironmentVariables": dict(definition.environment),
                "WorkingDirectory": str(Path.home()),
                "RunAtLoad": True,
                # Restarted after a crash only: a server that refuses to start would refuse again.
                "KeepAlive": {"Crashed": True},
                "ThrottleInterval": PAUSE_S,
                "ExitTimeOut": STOP_S,
                # Others are throttled, reads included, and every token reads.
                "ProcessType": "Interactive",
                "SoftResourceLimits": {"NumberOfFiles": FILES, "Core": 0},
                "HardResourceLimits": {"NumberOfFiles": FILES, "Core": 0},
                "Umask": 0o077,
            },
            sort_keys=False,
        )

    def command_in(self, text: bytes) -> list[str]:
        try:
            return [str(word) for word in plistlib.loads(text)["ProgramArguments"]]
        except (ValueError, LookupError, TypeError, ExpatError) as error:
            raise ValueError(str(error)) from None

    def start(self) -> None:
        self.stop()
        ran("launchctl", "enable", f"{self._domain}/{LABEL}")  # whoever disabled it once wants it now
        done = ran("launchctl", "bootstrap", self._domain, str(self.file))
        if done.returncode:
            raise FlashError(
                f"launchd does not start the service: {why(done)}. It has a place for one only while this user is "
                "logged in at the Mac's screen."
            )

    def stop(self) -> None:
        if not self._is_known():
            return
        done = ran("launchctl", "bootout", f"{self._domain}/{LABEL}")
        end = time.monotonic() + GONE_S  # bootout may return before the process has ended
        while self._is_known():
            if time.monotonic() > end:
                raise FlashError(f"launchd does not stop the service: {why(done)}.")
            time.sleep(0.2)

    def state(self) -> ServiceState:
        done = ran("launchctl", "print", f"{self._domain}/{LABEL}")
        pid = re.search(r"^\s*pid = (\d+)", done.stdout, re.MULTILINE)
        code = re.search(r"^\s*last (?:exit code|terminating signal) = (.+)", done.stdout, re.MULTILINE)
        return ServiceState(int(pid[1]) if pid else None, code[0].strip() if code and not pid else "")

    def _is_known(self) -> bool:
        return ran("launchctl", "print", f"{self._domain}/{LABEL}").returncode == 0
