"""The host file: which machines take part. Its form is MLX's, as `mlx.distributed_config` writes it."""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError

LOOPBACK = "127.0.0.1"
OWN_KEYS = ("python", "memory", "model")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\0\n]*")


@dataclass(frozen=True)
class RankHost:
    """One rank's machine.

    ssh: its name for ssh. address: the IPv4 address on which rank 0 listens, and from which another rank connects.
    python: the interpreter there, None for this one's path. memory, model: None for what rank 0 was given. variables:
    NAME=VALUE.
    """

    ssh: str
    address: str
    python: str | None = None
    memory: str | None = None
    model: str | None = None
    variables: tuple[str, ...] = ()

    @property
    def local(self) -> bool:
        return self.ssh in (LOOPBACK, "localhost")


def local_hosts(count: int) -> list[RankHost]:
    """`count` ranks on this machine."""
    return [RankHost(LOOPBACK, LOOPBACK)] * count


def read_hosts(path: str | os.PathLike[str]) -> list[RankHost]:
    """The ranks of a host file, in its order. Raises UsageError."""
    from mlx._distributed_utils.common import Hostfile

    if not Path(path).is_file():  # A pipe could be read once only.
        raise UsageError(f"the host file {str(path)!r} is not a file. `mlx.distributed_config` writes such a file.")
    try:
        parsed = Hostfile.from_file(path)
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UsageError(f"{error}. `mlx.distributed_config` writes such a file.") from None
    entries = found["hosts"] if isinstance(found, dict) else found
    if not isinstance(entries, list):
        raise UsageError(f"the host file {path} has no list of machines. `mlx.distributed_config` writes such a file.")
    if len(entries) < 2:
        raise UsageError(f"the host file {path} names {len(entries)} machines; at least 2 are needed.")
    if not isinstance(parsed.envs, list):
        raise UsageError(f"the host file {path} has {parsed.envs!r:.80} as envs; a list of NAME=VALUE is expected.")
    variables = tuple(parsed.envs)
    for variable in variables:
        if not isinstance(variable, str) or not VARIABLE.fullmatch(variable):
            raise UsageError(f"the host file {path} has {variable!r} in envs; NAME=VALUE is expected.")
    return [
        RankHost(_name(path, host.ssh_hostname), _address(path, host), *_own(path, entry), variables=variables)
        for host, entry in zip(parsed.hosts, entries, strict=True)
    ]


def _name(path: Any, name: Any) -> str:
    if not isinstance(name, str) or not name or name.startswith("-") or not name.isprintable():
        raise UsageError(f"the host file {path} has {name!r} as a name for ssh.")
    return name


def _address(path: Any, host: Any) -> str:
    """The first address of the entry."""
    ips = host.ips if isinstance(host.ips, list) else []
    try:
        address = ipaddress.IPv4Address(ips[0])
        if address.is_unspecified or address.is_multicast or address.is_reserved:  # of no interface, or of all
            raise ValueError
        return str(address)
    except (IndexError, ValueError):
        raise UsageError(
            f"the host file {path} gives {host.ssh_hostname} the addresses {host.ips!r}; the IPv4 address of the "
            'interface that joins the machines is expected, as in "ips": ["10.0.0.2"].'
        ) from None


def _own(path: Any, entry: dict[str, Any]) -> tuple[str | None, str | None, str | None]:
    for key in entry.keys() - OWN_KEYS:  # MLX's keys are many.
        if meant := difflib.get_close_matches(key, OWN_KEYS, 1):
            raise UsageError(f"the host file {path} has the key {key!r}, which is not known; {meant[0]!r} is.")
    for key in OWN_KEYS:
        if not isinstance(entry.get(key), str | None):
            raise UsageError(f"the host file {path} has {entry[key]!r} as {key}; a text is expected.")
    return entry.get("python"), entry.get("memory"), entry.get("model")
