"""Shared parts of the results: the environment, medians and spreads, a JSON file, a plot and a last line."""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import psutil

from mlx_flash import __version__
from mlx_flash.errors import FlashError, UsageError
from mlx_flash.flash.system import available_memory_bytes

FOLDER = Path("bench-results")

# One hue per thing, the same in every plot. Colour-blind readers can tell them apart, even in grey (Okabe and Ito).
COLOURS = {
    "reading": "#0072B2",
    "management": "#E69F00",
    "compute": "#999999",
    "ours": "#0072B2",
    "other": "#D55E00",
    "ceiling": "#000000",
    "good": "#009E73",
}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
}
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=writable_folder,
        default=str(FOLDER),
        help="folder for the JSON file and the plot (default: %(default)s)",
    )


def writable_folder(text: str) -> Path:
    """An argparse type for an output folder, which may not exist yet. Checks it before a long measurement."""
    folder = Path(text)
    try:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be used ({error.strerror}); choose another folder") from None
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is not a folder; choose another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{there} cannot be written to; choose another folder")
    return folder


def spread(samples: Iterable[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile, because a mean alone hides outliers."""
    median, p90, p99 = np.percentile(np.fromiter(samples, np.float64), (50, 90, 99)).tolist()
    return {"median": median, "p90": p90, "p99": p99}


def environment(path: Path) -> dict[str, Any]:
    """The commit, the machine, the disk that holds `path`, free memory in bytes, and versions."""
    usage = psutil.disk_usage(str(path))
    return {
        "mlx_flash": __version__,
        "commit": _commit(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "free_memory_bytes": available_memory_bytes(),
        "disk": {"file_system": _file_system(path), "bytes": usage.total, "free_bytes": usage.free},
        "mlx": version("mlx"),
        "device": str(mx.default_device().type).removeprefix("DeviceType."),
        "blas": Path(os.environ.get("LD_PRELOAD", "") or "bundled with mlx").name,
    }


def describe(where: dict[str, Any]) -> str:
    """One line for the foot of a plot."""
    return (
        f"{where['system']}, {where['cores']} cores ({where['processor']}), {where['memory_bytes'] / 2**30:.0f} GiB, "
        f"{where['disk']['file_system']}, MLX {where['mlx']} on {where['device']}, {where['blas']}, "
        f"commit {where['commit']}"
    )


def refuse_to_swap(needed_bytes: int, what: str, force: bool) -> None:
    """Raises UsageError if `what` does not fit in free memory, unless forced."""
    free = available_memory_bytes()
    if needed_bytes > free and not force:
        raise UsageError(
            f"{what} needs {needed_bytes / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free: the machine would swap. "
            "Close other programs, choose a smaller model, or pass --force."
        )


def cached_share(path: Path) -> float | None:
    """The share of a file's pages in the page cache; None if the system cannot tell.

    With direct reading it should stay near 0. A run is then cold as far as this machine's memory is concerned. The
    caches of the disk itself and of a hypervisor below it cannot be examined.
    """
    import mmap

    size = path.stat().st_size
    if platform.system() != "Linux" or size == 0:
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    pages = np.zeros(math.ceil(size / mmap.PAGESIZE), np.uint8)
    with path.open("rb") as file:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if address in (None, ctypes.c_void_p(-1).value):
            return None
        failed = libc.mincore(address, size, pages.ctypes.data)
        libc.munmap(address, size)
    return None if failed else float((pages & 1).mean())


def forget_cached(path: Path) -> None:
    """Asks the operating system to drop a file's pages. Does nothing on systems without such a call."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def finish(
    folder: Path,
    name: str,
    result: dict[str, Any],
    draw: Callable[[Any], None],
    size: tuple[float, float] = (8, 4.5),
    show: Callable[[], None] = lambda: None,
) -> None:
    """Writes NAME.json and NAME.png into `folder`, shows the result and prints it as the last line.

    draw: fills a matplotlib Figure. result: includes "environment", which is printed at the plot's foot. show: prints
    the table. It runs after the files are written, because the reader of standard output may be gone. A written file
    is complete, and the result is printed even if a file cannot be written. Raises FlashError in that case.
    """
    body = {"command": name, **result}
    written = f"not written: {folder / name}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with beside(folder / f"{name}.json") as path:
            path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        with rc_context(STYLE), beside(folder / f"{name}.png") as path:
            figure = Figure(figsize=size)
            draw(figure)
            figure.text(0.01, 0.012, describe(result["environment"]), fontsize=6, color="#555555")
            figure.tight_layout(rect=(0, 0.035, 1, 1))
            figure.savefig(path, format="png", dpi=160)
        written = f"written: {folder / name}.json, {folder / name}.png"
    except OSError as error:
        raise FlashError(
            f"not all results could be written into {folder} ({error.strerror}); the last line of standard output "
            "has them. Free some room there, or choose another --output."
        ) from None
    finally:
        show()
        print(written)
        print(json.dumps(body))


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Yields a temporary path and renames it to `path` at the end, so that an interruption leaves no partial file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def require_plots() -> None:
    """Raises UsageError if matplotlib is missing. Call it before a long measurement, not after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError('plots need matplotlib: `pip install "mlx-flash-runtime[bench]"` (-e ".[bench]")') from None


def _commit() -> str:
    """The commit of this clone, with "+" if files were changed; "unknown" outside of a clone."""
    here = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(here)]
        commit = subprocess.run([*git, "rev-parse", "--short=8", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno", "--", ":/*.py", ":/*.c"], capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _file_system(path: Path) -> str:
    """The kind of the file system that holds `path`, such as "ext4"."""
    target = os.path.realpath(path)
    held = [p for p in psutil.disk_partitions(all=True) if os.path.commonpath([target, p.mountpoint]) == p.mountpoint]
    return max(held, key=lambda p: len(p.mountpoint)).fstype if held else "unknown"
