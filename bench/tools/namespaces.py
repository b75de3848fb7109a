"""Several machines on one: a network namespace and a memory cgroup for each, joined by a wire of a fixed delay.

Needs Linux, root and a C compiler. The namespace number i (from 0) is called mac(i + 1) and has the address
10.77.0.(i + 1). `ssh mac2 COMMAND` works inside `Machines.environment`: a script of this module stands in for ssh. It
enters the namespace and the cgroup of that machine, and runs the command there.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlx_flash.errors import UsageError

from .cgroup import MemoryGroup, memory_group
from .preload import program_of

SOURCE = Path(__file__).with_name("wire.c")
MTU = 9000  # bytes of a packet; jumbo frames
DEVICE = "wire0"  # as in wire.c

# Options come before the host; of those that are used here, -o has a value. The rest is a command for a shell.
SSH = """#!/bin/sh
while :; do
    case "$1" in
        -o) shift 2 ;;
        -*) shift ;;
        *) break ;;
    esac
done
host=$1
shift
group="{groups}/$host/procs"
[ -e "$group" ] && echo $$ > "$group"
exec nsenter --net="/var/run/netns/$host" /bin/sh -c "$*"
"""


@dataclass(frozen=True)
class Machines:
    """Namespaces and their groups. folder: holds `ssh`, for the front of PATH."""

    names: list[str]
    groups: list[MemoryGroup]  # one for each machine, or none
    folder: Path

    @property
    def addresses(self) -> list[str]:
        return [address(i) for i in range(len(self.names))]

    def command(self, i: int, words: Sequence[str]) -> list[str]:
        """The command that runs `words` on machine i, in its namespace and its group."""
        return [str(self.folder / "ssh"), self.names[i], shlex.join(words)]

    def environment(self) -> dict[str, str]:
        """The variables with which `ssh` is this module's."""
        return {"PATH": f"{self.folder}:{os.environ.get('PATH', os.defpath)}"}


def address(i: int) -> str:
    return f"10.77.0.{i + 1}"


def usable() -> str | None:
    """Why machines cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "nsenter", "cc") if shutil.which(name) is None]
    if missing or not Path("/dev/net/tun").exists():
        return f"{' and '.join(missing) or '/dev/net/tun'} is missing"
    return None


@contextmanager
def machines(count: int, delay_s: float = 0.0, limit_bytes: int | None = None) -> Iterator[Machines]:
    """Makes `count` machines, and removes them at the end. delay_s: of a packet, each way. limit_bytes: of each cgroup.

    Raises UsageError if that is not possible here.
    """
    if (reason := usable()) is not None:
        raise UsageError(f"machines in namespaces cannot be made here: {reason}. This needs Linux and root.")
    names = [f"mac{i + 1}" for i in range(count)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlx_flash-machines-")))
        for name in names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "delete", name)
        stack.enter_context(_wire(names, delay_s))
        groups = []
        if limit_bytes is not None:
            for name in names:
                groups.append(stack.enter_context(memory_group(limit_bytes, name)))
                (folder / name).mkdir()
                (folder / name / "procs").symlink_to(groups[-1].folder / "cgroup.procs")
        (folder / "ssh").write_text(SSH.format(groups=folder))
        (folder / "ssh").chmod(0o755)
        yield Machines(names, groups, folder)


@contextmanager
def _wire(names: Sequence[str], delay_s: float) -> Iterator[None]:
    command = [str(program_of(SOURCE)), str(round(delay_s * 1e9)), str(MTU), *names]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as wire:
        try:
            assert wire.stdout is not None
            if wire.stdout.readline() != "ready\n":
                raise UsageError("the wire between the namespaces could not be made (see above).")
            for i, name in enumerate(names):
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "address", "add", f"{address(i)}/24", "dev", DEVICE)
                _ip("-n", name, "link", "set", DEVICE, "mtu", str(MTU), "up")
            yield
        finally:
            wire.kill()


def _ip(*words: str) -> None:
    try:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise UsageError(f"`ip {' '.join(words)}` failed: {error.stderr.strip()}") from None
