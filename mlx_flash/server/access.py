"""The clients that a server answers, and the names of its model."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from ..errors import UsageError

ALL = "*"
DEFAULT_MODEL = "default"  # names the loaded model, whatever its own name is
ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([^/?#@*\s\\]*|\*)", re.IGNORECASE)
HOST_NAME = re.compile(r"[a-z0-9_.-]+", re.IGNORECASE)
PORTS = {"http": ":80", "https": ":443"}  # Browsers leave these out.


@dataclass(frozen=True)
class Access:
    """The requests that a server accepts.

    host: the name or address that it is bound to.
    key: the API key that requests must carry; None for no key.
    hosts: further names that clients may call the server by.
    origins: origins of other sites' pages that may use the server, such as "http://localhost:3000", "null",
        "app://obsidian.md"; "vscode-webview://*" for every origin of such a scheme, "*" for all pages.
    names: names of the model beside the engine's own.
    strict_names: refuse a request that names another model. Otherwise every name stands for the loaded model.
    """

    host: str = "127.0.0.1"
    key: str | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    strict_names: bool = False

    def check(self) -> None:
        """Raises UsageError for a value that no request could match."""
        if self.key is not None and not (
            self.key.isascii() and self.key.isprintable() and self.key.strip() == self.key != ""
        ):
            raise UsageError(
                "the API key is empty or has characters that a header cannot carry. Use printable ASCII without "
                "spaces at either end."
            )
        for name in self.names:
            if not name.isprintable() or name.strip() != name or not name:
                raise UsageError(f"--name is {name!r:.80}, expected a name without spaces at either end.")
        for host in self.hosts:
            if not _is_host(host):
                raise UsageError(
                    f"--allow-host is {host!r:.80}, expected a name or an address without a port, such as "
                    "host.docker.internal."
                )
        for origin in self.origins:
            _check_origin(origin)

    def allows(self, origin: str) -> bool:
        """Whether pages of another origin may use the server."""
        allowed = {normal(value) for value in self.origins}
        scheme, colon, _ = origin.lower().partition(":")
        return ALL in allowed or normal(origin) in allowed or (bool(colon) and f"{scheme}://*" in allowed)


def normal(origin: str) -> str:
    """An origin as browsers write it: in small letters, without the port that its scheme has anyway."""
    origin = origin.lower()
    return origin.removesuffix(PORTS.get(origin.partition(":")[0], "")) if "://" in origin else origin


def _check_origin(origin: str) -> None:
    """Raises UsageError for a text that cannot be the origin of a page."""
    if origin in (ALL, "null"):
        return
    found = ORIGIN.fullmatch(origin)
    web = found is not None and found[1].lower() in PORTS
    if found is None or (not found[2] and found[1].lower() != "file") or (web and found[2] == ALL):
        raise UsageError(
            f"--allow-origin is {origin!r:.80}, expected an origin without a path, such as http://localhost:3000 or "
            "app://obsidian.md, or null, or * for all."
        )


def _is_host(text: str) -> bool:
    if HOST_NAME.fullmatch(text):
        return True
    try:
        return bool(ip_address(text.removeprefix("[").removesuffix("]")))
    except ValueError:
        return False


def model_name(model: str | None) -> str:
    """The name that a model has by default. model: the value of --model.

    It is "demo" for the packaged model, the last part of a local folder's path, and a Hugging Face id itself.
    """
    if model is None:
        return "demo"
    try:
        folder = Path(model).expanduser()
        return (os.path.basename(os.path.abspath(folder)) or model) if folder.is_dir() else model
    except (OSError, RuntimeError, ValueError):  # Loading says what is wrong with it.
        return model
