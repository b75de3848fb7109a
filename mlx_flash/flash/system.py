"""Everything that differs between macOS and Linux: opening a file past the page cache, fsync, memory figures."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import psutil

READ_ALIGNMENT = 4096
"""Bytes. File offset, address and length of a direct read are multiples of this, the block size of Apple's SSDs."""

POOL_ALIGNMENT = 16384 if sys.platform == "darwin" else 4096
"""Bytes. A memory pool starts at a multiple of this, the size of a page."""

# bsd/sys/fcntl.h; Python's fcntl module does not have both on every build.
_F_RDAHEAD = 45
_F_NOCACHE = 48

_HUGE_PAGE = 2 << 20  # on x86-64, and on arm64 with pages of 4 KiB
# include/uapi/asm-generic/mman-common.h; Python's mmap module has no MADV_COLLAPSE before 3.13.
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25
# From glibc's malloc.h, and the highest threshold that glibc's own rule sets.
_M_MMAP_THRESHOLD = -3
_LARGEST_MMAP_THRESHOLD = 32 << 20


def open_for_reading(path: str | os.PathLike[str], direct: bool) -> tuple[int, bool]:
    """Opens `path` for positional reads, past the page cache if `direct` and the file system can.

    Returns the descriptor and whether direct reading was obtained. Raises OSError.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC
    if sys.platform == "darwin":
        fd = os.open(path, flags)
        return fd, direct and _bypass_cache_on_macos(fd)
    if direct:
        fd = _open_direct_on_linux(path, flags)
        if fd is not None:
            return fd, True
    fd = os.open(path, flags)
    # Units lie anywhere in the file, so the kernel's read-ahead would fetch bytes that no read needs.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return fd, False


def _bypass_cache_on_macos(fd: int) -> bool:
    import fcntl

    try:
        fcntl.fcntl(fd, _F_NOCACHE, 1)
        fcntl.fcntl(fd, _F_RDAHEAD, 0)
    except OSError:
        return False
    return True


def _open_direct_on_linux(path: str | os.PathLike[str], flags: int) -> int | None:
    """A descriptor on which a direct read at READ_ALIGNMENT worked, or None if the file system refuses such reads."""
    refused = (errno.EINVAL, errno.EOPNOTSUPP)
    try:
        fd = os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno in refused:
            return None
        raise
    try:
        # Some file systems accept the flag and refuse the read, or want a larger alignment than ours.
        with mmap.mmap(-1, READ_ALIGNMENT) as page:
            os.preadv(fd, [page], 0)
    except OSError as error:
        os.close(fd)
        if error.errno in refused:
            return None
        raise
    return fd


def current_memory_bytes() -> int:
    """Memory of this process now: resident bytes on Linux; on macOS the physical footprint, with Metal's memory."""
    if sys.platform == "darwin":
        return _macos_footprint()[0]
    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes() -> int:
    """The most memory that this process has had since its start, counted as in `current_memory_bytes`."""
    if sys.platform == "darwin":
        return _macos_footprint()[1]
    # Not ru_maxrss: Linux carries it over exec, so a child of a large process starts with its parent's peak.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return current_memory_bytes()


def _macos_footprint() -> tuple[int, int]:
    """(bytes now, peak bytes), from proc_pid_rusage; libproc.h and sys/resource.h, struct rusage_info_v4."""
    words = (ctypes.c_uint64 * 37)()  # 16 bytes of identity, then 35 numbers
    if ctypes.CDLL("/usr/lib/libproc.dylib").proc_pid_rusage(os.getpid(), 4, words):
        raise OSError("proc_pid_rusage failed")
    return words[2 + 7], words[2 + 28]  # ri_phys_footprint, ri_lifetime_max_phys_footprint


def use_huge_pages(address: int, nbytes: int, now: bool = True) -> bool:
    """Moves aligned 2 MiB ranges of memory into huge pages on Linux, without changing contents or addresses. Returns
    whether all of them were moved.

    A read into scattered 4 KiB pages is a long list for the kernel, the disk and a hypervisor; a huge page is one
    entry. Only speed depends on this. macOS has 16 KiB pages and no such call. now: whether to wait for it, which takes
    longer than the memory's allocation.
    """
    start = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    length = (address + nbytes) // _HUGE_PAGE * _HUGE_PAGE - start
    if sys.platform != "linux" or length <= 0:
        return False
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    # The first call lets the kernel do it in its own time; the second (Linux 6.1 and later) asks for it now.
    return madvise(start, length, _MADV_HUGEPAGE) == 0 and now and madvise(start, length, _MADV_COLLAPSE) == 0


def mark_in_use(fd: int) -> None:
    """Keeps `mlxflash cache` from removing the file while it is open; nothing else looks at the lock."""
    import fcntl

    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


def sync_to_disk(fd: int) -> None:
    """An fsync whose effect survives a power cut. macOS's own leaves the bytes in the drive's cache (fsync(2))."""
    if sys.platform == "darwin":
        import fcntl

        with contextlib.suppress(OSError):  # a file system without this call
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def available_memory_bytes() -> int:
    """Bytes that can still be allocated without swapping: the machine's, or less under a memory cgroup's limit."""
    available = int(psutil.virtual_memory().available)
    if sys.platform != "linux":
        return available
    try:
        membership = Path("/proc/self/cgroup").read_text()
    except OSError:
        return available
    free = cgroup_free_bytes(membership, Path("/sys/fs/cgroup"))
    return available if free is None else min(available, free)


def usable_memory_bytes() -> int:
    """`available_memory_bytes`, on Metal at most what Metal recommends: more would be swapped or refused."""
    available = available_memory_bytes()
    if mx.default_device() == mx.cpu:
        return available
    return min(available, int(mx.device_info().get("max_recommended_working_set_size", available)))


def cgroup_free_bytes(membership: str, mount: Path) -> int | None:
    """Bytes that the memory cgroups of a process leave free; None if none of them sets a limit.

    membership: the text of /proc/self/cgroup. mount: where the cgroup file systems are mounted.
    """
    free: list[int] = []
    for line in membership.splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" and not controllers:
            root, limits = mount, ["memory.max", "memory.high"]
            usage, prefix = "memory.current", ""
        elif "memory" in controllers.split(","):
            root, limits = mount / "memory", ["memory.limit_in_bytes"]
            usage, prefix = "memory.usage_in_bytes", "total_"
        else:
            continue
        # The limits of all ancestors hold. In a container the path is the host's and may not exist below this mount.
        group = root / path.lstrip("/")
        while True:
            set_limits = [found for name in limits if (found := _number(group / name)) is not None]
            used_bytes = _number(group / usage)
            if set_limits and used_bytes is not None:
                # The page cache counts as used. The system takes it back, what was read twice (active) as well.
                for pages in ("inactive_file", "active_file"):
                    used_bytes -= _statistic(group / "memory.stat", prefix + pages)
                free.append(max(0, min(set_limits) - used_bytes))
            if group == root:
                break
            group = group.parent
    return min(free, default=None)


def _number(path: Path) -> int | None:
    """The integer a cgroup file holds; None if there is no such file or it says "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _statistic(path: Path, key: str) -> int:
    """One value of a memory.stat file, in bytes; 0 if it is missing."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def return_freed_memory() -> None:
    """Returns freed memory to the system. glibc otherwise keeps much of what many small arrays leave behind."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(ctypes.c_size_t(0))


@contextlib.contextmanager
def large_memory_given_back() -> Iterator[None]:
    """Inside this context, glibc returns memory of at least 1 MiB to the system as soon as it is freed.

    Otherwise glibc keeps pieces of up to 32 MiB in its heap, between those that are still in use: more than 100 MB
    after a prompt. On exit it does so again, because the heap serves the allocations of every token faster.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if change is None:
        yield
        return
    change(_M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        change(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        return_freed_memory()


def asleep_s() -> float:
    """Seconds that the machine has slept since it was started: one clock goes on while it sleeps, another stops."""
    if sys.platform == "darwin":
        return time.clock_gettime(time.CLOCK_MONOTONIC) - time.clock_gettime(time.CLOCK_UPTIME_RAW)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)
