"""Several machines on one: a network namespace and a memory cgroup for each, joined by a wire of a fixed delay.

Needs Linux, root and a C compiler. The machine number i (from 0) is called mac(i + 1) and has the address
10.77.0.(i + 1). `ssh mac2 COMMAND` works with `Machines.environment`: a script of this module stands in for ssh. It
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
SPACES = Path("/var/run/netns")  # where `ip netns` has them

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
group="{folder}/$host/procs"
[ -e "$group" ] && echo $$ > "$group"
exec nsenter --net="{folder}/$host/space" /bin/sh -c "$*"
"""


@dataclass(frozen=True)
class Machines:
    """Names of machines, their namespaces and their groups. folder: holds `ssh`, for the front of PATH."""

    names: list[str]
    spaces: list[Path]
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
    missing = [name for name in ("ip", "nsenter", "unshare", "cc") if shutil.which(name) is None]
    if missing or not Path("/dev/net/tun").exists():
        return f"{' and '.join(missing) or '/dev/net/tun'} is missing"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode != 0:
        return "this container has no right to make network namespaces"
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
        spaces = [SPACES / f"{folder.name}-{name}" for name in names]
        for name, space in zip(names, spaces, strict=True):
            _ip("netns", "add", space.name)
            stack.callback(_ip, "netns", "delete", space.name)
            (folder / name).mkdir()
            (folder / name / "space").symlink_to(space)
        stack.enter_context(_wire([space.name for space in spaces], delay_s))
        groups = []
        if limit_bytes is not None:
            groups = [stack.enter_context(memory_group(limit_bytes, f"-{name}")) for name in names]
        for name, group in zip(names, groups, strict=False):
            (folder / name / "procs").symlink_to(group.folder / "cgroup.procs")
        (folder / "ssh").write_text(SSH.format(folder=folder))
        (folder / "ssh").chmod(0o755)
        yield Machines(names, spaces, groups, folder)


@contextmanager
def _wire(spaces: Sequence[str], delay_s: float) -> Iterator[None]:
    command = [str(program_of(SOURCE)), str(round(delay_s * 1e9)), str(MTU), *spaces]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as wire:
        try:
            assert wire.stdout is not None
            if wire.stdout.readline() != "ready\n":
                raise UsageError("the wire between the namespaces could not be made (see above).")
            for i, space in enumerate(spaces):
                _ip("-n", space, "link", "set", "lo", "up")
                _ip("-n", space, "address", "add", f"{address(i)}/24", "dev", DEVICE)
                _ip("-n", space, "link", "set", DEVICE, "mtu", str(MTU), "up")
            yield
        finally:
            wire.kill()


def _ip(*words: str) -> None:
    try:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise UsageError(f"`ip {' '.join(words)}` failed: {error.stderr.strip()}") from None
