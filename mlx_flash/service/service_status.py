"""How the service is: whether it runs, where, and what it said last."""

from __future__ import annotations

import http.client
import shlex
from collections.abc import Sequence
from pathlib import Path

from .definition import ServiceFiles, flags_in
from .system_manager import SystemManager

LINES = 5  # of the log
TAIL_BYTES = 16 << 10
ANSWER_S = 3.0
STATES = {200: "its model is loaded", 503: "it is loading its model"}


def show(manager: SystemManager, where: ServiceFiles) -> int:
    """Prints how the service is. Returns the exit code: 0 if it runs. Raises FlashError."""
    if not manager.file.exists():
        print("there is no service. `mlxflash service install` makes one.")
        return 1
    try:
        command = manager.command_in(manager.file.read_bytes())
        flags = flags_in(command)
    except ValueError as error:
        print(f"{manager.file} was not written by `mlxflash service install`: {error}. Remove it, and install again.")
        return 1
    state = manager.state()
    if state.pid is not None:
        host, port = address_of(flags)
        answer = answer_of(host, port)
        print(f"running: process {state.pid}, {url_of_address(host, port)}, {STATES.get(answer or 0, 'no answer yet')}")
    else:
        print(f"not running{state.ended and f': {state.ended}'}")
    print(f"starts: {manager.starts}, by {manager.name}")
    print(f"server's flags: {shlex.join(flags) or 'none'}")
    print(f"definition: {manager.file}")
    print(f"log: {where.log}")
    for line in last_lines(where.log, LINES):
        print(f"  {line}")
    if not Path(command[0]).exists():
        key = " with MLX_FLASH_API_KEY set" if any(word.startswith("--key=") for word in command) else ""
        print(
            f"Its Python, {command[0]}, is gone: the environment was moved or removed. Install the service again, by "
            f"the mlxflash of the new one{key}:\n  mlxflash service install {shlex.join(flags)}".rstrip()
        )
    return 0 if state.pid is not None else 1


def address_of(flags: Sequence[str]) -> tuple[str, int]:
    """(host, port) that the server has with these flags."""
    given = dict(flag.split("=", 1) for flag in flags if flag.startswith(("--host=", "--port=")))
    return given.get("--host", "127.0.0.1"), int(given.get("--port", 8080))


def url_of_address(host: str, port: int) -> str:
    """The URL by which this machine reaches a server that is bound to `host`."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def answer_of(host: str, port: int) -> int | None:
    """The HTTP status of /health; None if nothing answers."""
    connection = http.client.HTTPConnection(url_of_address(host, port).removeprefix("http://"), timeout=ANSWER_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def last_lines(log: Path, count: int) -> list[str]:
    """The last lines of the log that have text."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.strip()][-count:]
