"""Differences between the systems: opening files and measuring memory."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_flash.flash import system

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file.bin"
    path.write_bytes(bytes(range(256)) * 64)
    return path


def test_buffered_opening_is_never_called_direct(path: Path) -> None:
    fd, direct = system.open_for_reading(path, False)
    try:
        assert not direct
        assert not os.get_inheritable(fd)
        assert os.pread(fd, 3, 255) == b"\xff\x00\x01"
    finally:
        os.close(fd)


def test_what_was_opened_serves_aligned_reads(path: Path) -> None:
    fd, direct = system.open_for_reading(path, True)
    try:
        base = np.zeros(3 * system.READ_ALIGNMENT, np.uint8)
        start = -base.ctypes.data % system.READ_ALIGNMENT
        page = base[start : start + system.READ_ALIGNMENT]
        assert os.preadv(fd, [page.data], system.READ_ALIGNMENT) == page.size
        assert page.tobytes() == path.read_bytes()[system.READ_ALIGNMENT :][: page.size]
        if sys.platform == "linux":
            import fcntl

            assert bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT) == direct
    finally:
        os.close(fd)


@linux_only
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("call", ["open", "preadv"])
def test_a_file_system_that_refuses_direct_reading(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    real = getattr(os, call)

    def refuse(*arguments: object) -> object:
        if call == "open" and not arguments[1] & os.O_DIRECT:  # type: ignore[operator]
            return real(*arguments)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, refuse)
    before = len(os.listdir("/proc/self/fd"))
    fd, direct = system.open_for_reading(path, True)
    monkeypatch.undo()
    assert not direct
    assert os.pread(fd, 2, 0) == b"\x00\x01"
    os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before


@linux_only
def test_an_input_output_error_at_the_trial_is_not_hidden(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> object:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="broken"):
        system.open_for_reading(path, True)


def test_a_missing_file(tmp_path: Path) -> None:
    for direct in (True, False):
        with pytest.raises(FileNotFoundError):
            system.open_for_reading(tmp_path / "none", direct)


def test_memory_figures_follow_an_allocation() -> None:
    """Runs in its own process, because the peak of this one depends on the tests before."""
    program = """
from mlx_flash.flash import system
before = system.current_memory_bytes()
block = bytearray(64 << 20)
grown = system.current_memory_bytes() - before
del block
after, peak = system.current_memory_bytes(), system.peak_memory_bytes()
print(before, grown, after, peak, system.available_memory_bytes())
"""
    ballast = bytearray(200 << 20)  # resident in this process when the other starts; it must not count there
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    before, grown, after, peak, available = map(int, done.stdout.split())
    del ballast
    assert 60 << 20 < grown < 80 << 20
    assert before < after + (8 << 20) < peak
    assert peak < before + (90 << 20)
    assert available > 0


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_cgroup_v2_takes_the_tightest_ancestor(tmp_path: Path) -> None:
    write(
        tmp_path / "a",
        memory__max="1000\n",
        memory__current="900\n",
        memory__stat="anon 500\ninactive_file 150\nactive_file 100\n",
    )
    write(tmp_path / "a/b", memory__max="max\n", memory__current="100\n")
    assert system.cgroup_free_bytes("0::/a/b\n", tmp_path) == 350
    write(tmp_path / "a/b", memory__max="120\n")
    assert system.cgroup_free_bytes("0::/a/b\n", tmp_path) == 20
    write(tmp_path / "a/b", memory__max="90\n")
    assert system.cgroup_free_bytes("0::/a/b\n", tmp_path) == 0
    write(tmp_path / "a/b", memory__max="130\n", memory__high="115\n")
    assert system.cgroup_free_bytes("0::/a/b\n", tmp_path) == 15


def test_cgroup_v1_in_a_container(tmp_path: Path) -> None:
    write(
        tmp_path / "memory",
        memory__limit_in_bytes="5000",
        memory__usage_in_bytes="4000",
        memory__stat="total_inactive_file 700\ntotal_active_file 300\n",
    )
    membership = "12:cpu,cpuacct:/x\n5:memory:/docker/0123\n0::/\n"
    assert system.cgroup_free_bytes(membership, tmp_path) == 2000


def test_no_cgroup_limit(tmp_path: Path) -> None:
    assert system.cgroup_free_bytes("0::/\n", tmp_path) is None
    assert system.cgroup_free_bytes("", tmp_path) is None


@linux_only
def test_huge_pages_keep_the_bytes_and_their_place() -> None:
    memory = np.random.default_rng(0).integers(0, 256, 7 << 20, dtype=np.uint8)
    before = memory.copy()
    system.use_huge_pages(memory.ctypes.data + 3, memory.nbytes - 3)  # the system decides between True and False
    assert np.array_equal(memory, before)
    assert not system.use_huge_pages(memory.ctypes.data, 4096)  # it contains no whole huge page


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's way of keeping memory")
def test_freed_memory_is_handed_back() -> None:
    pieces = [np.ones(8000) for _ in range(3000)]  # 64 kB each, too small for their own mappings
    before = system.current_memory_bytes()
    pieces = pieces[-1:]  # keeps the end of the heap in use
    system.return_freed_memory()
    assert before - system.current_memory_bytes() > 100e6


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's way of keeping memory")
def test_large_memory_is_given_back_at_once() -> None:
    """Runs in its own process, because malloc's behaviour depends on earlier frees."""
    script = """
import numpy as np
from mlx_flash.flash import system

def kept_bytes():
    before = system.current_memory_bytes()
    pieces = [np.ones(250_000 + 1000 * i) for i in range(40)]  # 2 MB each
    pieces = pieces[::8]  # what stays lies between what goes
    return system.current_memory_bytes() - before - sum(piece.nbytes for piece in pieces)

large = np.ones(3_900_000)  # 31 MB: once that is freed, malloc takes all that is smaller from its heap
del large
ordinary = kept_bytes()
with system.large_memory_given_back():
    within = kept_bytes()
after = kept_bytes()
assert ordinary > 40e6 and within < 5e6 and after > 40e6, (ordinary, within, after)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
