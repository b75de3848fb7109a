"""Runs a command in a Linux memory cgroup: the kernel kills processes over the limit. Needs root."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_flash.errors import UsageError

V1 = Path("/sys/fs/cgroup/memory")
V2 = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryGroup:
    """A cgroup (v1 or v2) with a memory limit and without swap."""

    folder: Path
    v1: bool

    def run(self, command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Calls `run_child` inside the cgroup."""
        return run_child(command, environment, lambda: (self.folder / "cgroup.procs").write_text(str(os.getpid())))

    def peak_bytes(self) -> int:
        """The peak of anonymous memory and page cache together."""
        return int((self.folder / ("memory.max_usage_in_bytes" if self.v1 else "memory.peak")).read_text())

    def kills(self) -> int:
        """The number of processes that the kernel killed for memory."""
        text = (self.folder / ("memory.oom_control" if self.v1 else "memory.events")).read_text()
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith("oom_kill ")))


def run_child(
    command: list[str], environment: dict[str, str] | None = None, enter: Callable[[], object] = lambda: None
) -> subprocess.CompletedProcess[str]:
    """Runs a command and returns its standard output; its standard error is shown. It never outlives the call.

    enter: called in the child before the command begins. The child ignores Ctrl-C, which a terminal sends to both
    processes. This process kills the child and then raises.
    """

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        enter()

    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=prepare) as child:
        try:
            output, _ = child.communicate()
        except BaseException:
            child.kill()
            child.wait()
            raise
    return subprocess.CompletedProcess(command, child.returncode, output)


def remove(folder: Path) -> None:
    """Removes a group. The kernel may need a moment to release a killed process."""
    for _ in range(100):
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)
        else:
            return
    folder.rmdir()


@contextlib.contextmanager
def memory_group(limit_bytes: int, name: str = "") -> Iterator[MemoryGroup]:
    """Makes a group and removes it at the end. Raises UsageError if that is not possible.

    name: tells several groups of this process apart.
    """
    v1 = (V1 / "memory.limit_in_bytes").exists()
    folder = (V1 if v1 else V2) / f"mlx_flash-{os.getpid()}{name}"
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(limit_bytes))
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise UsageError(f"no memory cgroup can be made here ({error}); this needs Linux and root.") from None
    with contextlib.suppress(OSError):  # the file is missing if the kernel does not account for swap
        (folder / ("memory.memsw.limit_in_bytes" if v1 else "memory.swap.max")).write_text(
            str(limit_bytes if v1 else 0)
        )
    try:
        yield MemoryGroup(folder, v1)
    finally:
        remove(folder)
