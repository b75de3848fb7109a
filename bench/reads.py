"""How fast are random reads, by piece size and number of threads? Times our reader beside fio and a Python loop."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from tqdm import tqdm

from mlx_flash.cli.run import whole_number
from mlx_flash.errors import UsageError
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.unit_file import UnitFile
from mlx_flash.loading.plan import parse_memory

from .tools import read_methods as methods
from .tools.read_methods import Pieces, ReadRate
from .tools.report import add_output_argument, cached_share, environment, finish, forget_cached, require_plots, spread

PIECES_KIB = (4, 16, 32, 64, 256, 1024, 4096)
THREADS = (1, 4, 8, 16, 32)
NEURON_KIB = (16, 256)  # range of unit sizes in dense models; decides the best number of threads
SPARE_BYTES = 1 << 30  # disk space to leave free
COPY_BYTES = 8 << 20

METHODS = {  # in the table's order
    "fio": "fio",
    "kept_full": "our reader, queue kept full, one destination per thread (as fio)",
    "slots": "our reader, queue kept full, into the slots of a pool",
    "drained": f"our reader, {methods.BATCH_READS} reads, then wait",
    "busy": "the same beside a busy main thread",
    "python": "Python threads calling preadv",
    "python_busy": "the same beside a busy main thread",
}


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--file", type=Path, help="file to read, ideally larger than any cache (default: a temporary file)"
    )
    parser.add_argument("--size", default="2GB", help="size of the temporary file (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="folder for the temporary file (default: the current folder)"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_file_arguments(parser)
    parser.add_argument(
        "--pieces-kib",
        type=_numbers(4, 16384),
        default=PIECES_KIB,
        help="comma-separated list of piece sizes, multiples of 4 (default: 4,16,32,64,256,1024,4096)",
    )
    parser.add_argument(
        "--threads",
        type=_numbers(1, 256),
        default=THREADS,
        help="comma-separated list of thread counts (default: 1,4,8,16,32)",
    )
    parser.add_argument(
        "--rounds", type=whole_number(1), default=3, help="rounds to take the median of (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=_seconds, default=0.25, help="seconds per method and round (default: %(default)s)"
    )
    parser.add_argument("--no-fio", action="store_true", help="do not run fio, even if it is installed")
    add_output_argument(parser)


def main(arguments: argparse.Namespace) -> None:
    if any(kib % 4 for kib in arguments.pieces_kib):
        raise UsageError("--pieces-kib must be multiples of 4: direct reads are aligned to 4 KiB.")
    require_plots()
    fio = None if arguments.no_fio else methods.find_fio()
    if fio is None:
        print("Without fio, the ceiling is the best measured rate.")
    with opened_file(arguments) as (path, file):
        if file.size < max(arguments.pieces_kib) << 10:
            raise UsageError(f"{path} has {file.size} bytes, less than the largest piece. Choose a larger file.")
        result = {
            "rounds": arguments.rounds,
            "seconds": arguments.seconds,
            "file_bytes": file.size,
            "direct": file.direct,
            "rows": [row.summary() for row in measure(file, fio, arguments)],
            "ceiling": "fio" if fio else "best measured",
            "best_threads": 0,
            "cached_share": (share := cached_share(path)),
            "cache": cache_state(file.direct, share),
            "environment": environment(path),
        }
    result["best_threads"] = best_threads(result["rows"])
    from .tools.reads_plot import draw

    typical = [row for row in neuron_sized(result["rows"]) if row["threads"] == result["best_threads"]]
    finish(
        arguments.output,
        "reads",
        result,
        lambda figure: draw(figure, result, typical),
        size=(12, 5.2),
        show=lambda: print_table(result),
    )


@dataclass
class ReadRow:
    """The samples of all rounds at one piece size and number of threads."""

    piece_bytes: int
    threads: int
    samples: dict[str, list[ReadRate]] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Medians, and ratios to each round's ceiling, because the disk's speed drifts between rounds.

        The ceiling of a round is fio's rate, or the best rate without fio.
        """
        rates = {name: [s.bytes_per_second for s in taken] for name, taken in self.samples.items()}
        ceilings = rates.get("fio") or [max(values) for values in zip(*rates.values(), strict=True)]
        summaries = {}
        for name, taken in self.samples.items():
            batches = [1e3 * seconds for sample in taken for seconds in sample.batch_seconds]
            cpu = [1e6 * s.cpu_seconds / s.reads for s in taken if s.cpu_seconds is not None and s.reads]
            summaries[name] = {
                "bytes_per_second": float(np.median(rates[name])),
                "slowest": min(rates[name]),
                "fastest": max(rates[name]),
                "ratio": float(np.median(np.divide(rates[name], ceilings))),
                "cpu_us_per_read": float(np.median(cpu)) if cpu else None,
                "batch_ms": spread(batches) if batches else None,
            }
        return {
            "piece_bytes": self.piece_bytes,
            "threads": self.threads,
            "batch_reads": methods.batch_reads(self.piece_bytes),
            "ceiling_bytes_per_second": float(np.median(ceilings)),
            "methods": summaries,
        }


def measure(file: UnitFile, fio: str | None, arguments: argparse.Namespace) -> list[ReadRow]:
    """Runs every method at every size and depth in each round, so that drift affects all of them alike."""
    rows = [ReadRow(kib << 10, threads) for threads in arguments.threads for kib in arguments.pieces_kib]
    seconds = arguments.seconds
    with contextlib.ExitStack() as stack:
        readers = {threads: stack.enter_context(Reader(threads)) for threads in arguments.threads}
        bar = stack.enter_context(
            tqdm(total=arguments.rounds * len(rows), desc="reading", unit="figure", dynamic_ncols=True)
        )
        for seed in range(arguments.rounds):
            for row in rows:
                # Alternate the order, so that no method always comes first.
                order = ["fio", "python", "ours"] if seed % 2 else ["ours", "python", "fio"]
                for step in order:
                    if step == "fio":
                        taken = _fio(fio, file, row, seconds)
                    elif step == "python":
                        taken = _python(file, row, seed, seconds)
                    else:
                        taken = _ours(readers[row.threads], file, row, seed, seconds)
                    for name, sample in taken.items():
                        row.samples.setdefault(name, []).append(sample)
                bar.update()
    return rows


def _ours(reader: Reader, file: UnitFile, row: ReadRow, seed: int, seconds: float) -> dict[str, ReadRate]:
    pieces = Pieces(file, row.piece_bytes, seed)
    slots = methods.keep_full(reader, pieces, seconds)
    drained = methods.drain_batches(reader, pieces, seconds)
    work_seconds = float(np.median(drained.batch_seconds))  # as long as the reads, so all of them can be hidden
    busy = methods.drain_beside_work(reader, pieces, seconds, work_seconds)
    pieces.use_slots(row.threads)
    return {
        "slots": slots,
        "drained": drained,
        "busy": busy,
        "kept_full": methods.keep_full(reader, pieces, seconds),
    }


def _python(file: UnitFile, row: ReadRow, seed: int, seconds: float) -> dict[str, ReadRate]:
    pieces = Pieces(file, row.piece_bytes, seed)
    pieces.use_slots(row.threads)
    return {
        "python": methods.loop_in_python(pieces, row.threads, seconds, busy=False),
        "python_busy": methods.loop_in_python(pieces, row.threads, seconds, busy=True),
    }


def _fio(fio: str | None, file: UnitFile, row: ReadRow, seconds: float) -> dict[str, ReadRate]:
    if fio is None:
        return {}
    return {"fio": methods.run_fio(fio, file.path, file.direct, row.piece_bytes, row.threads, seconds)}


def cache_state(direct: bool, share: float | None) -> str:
    """The known state of the caches. share: the share of the file that is in the system's page cache."""
    if direct and share is not None and share < 0.05:
        return "re-read"  # read from the disk; its own cache or a hypervisor's may hold the file
    if not direct and share is not None and share > 0.95:
        return "warm"
    return "unknown"


def best_threads(rows: list[dict[str, Any]]) -> int:
    """The number of threads with the highest ceiling, over the sizes of neurons if they were measured."""
    some = neuron_sized(rows)
    depths = sorted({row["threads"] for row in some})
    logs = {n: [np.log(r["ceiling_bytes_per_second"]) for r in some if r["threads"] == n] for n in depths}
    return max(depths, key=lambda n: float(np.mean(logs[n])))


def neuron_sized(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows at sizes of neurons, or all rows if there are none."""
    least, most = (kib << 10 for kib in NEURON_KIB)
    return [row for row in rows if least <= row["piece_bytes"] <= most] or rows


def size_name(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 and nbytes % (1 << 20) == 0 else f"{nbytes >> 10} KiB"


def print_table(result: dict[str, Any]) -> None:
    shown = [name for name in METHODS if name in result["rows"][0]["methods"]]
    print(f"MB/s, and the share of the ceiling ({result['ceiling']}); state of the cache: {result['cache']}")
    for name in shown:
        print(f"  {name}: {METHODS[name]}")
    print(f"{'size':>8}{'threads':>9}{'ceiling':>9}" + "".join(f"{name:>14}" for name in shown if name != "fio"))
    for row in result["rows"]:
        line = f"{size_name(row['piece_bytes']):>8}{row['threads']:>9}{row['ceiling_bytes_per_second'] / 1e6:>9.0f}"
        for name in shown:
            if name != "fio":
                one = row["methods"][name]
                line += f"{one['bytes_per_second'] / 1e6:>8.0f}{one['ratio']:>6.2f}"
        print(line)


@contextlib.contextmanager
def opened_file(arguments: argparse.Namespace) -> Iterator[tuple[Path, UnitFile]]:
    """Yields the file to read random pieces from, after reading all of it once."""
    with _file(arguments) as path, UnitFile(path) as file:
        _read_once(path, file)
        yield path, file


@contextlib.contextmanager
def _file(arguments: argparse.Namespace) -> Iterator[Path]:
    """Yields the user's file, or a temporary file of random bytes."""
    if arguments.file is not None:
        if not arguments.file.is_file():  # reading a pipe would block
            raise UsageError(f"--file {arguments.file} is not a regular file. Name one, or leave the flag out.")
        yield arguments.file
        return
    folder = arguments.folder
    try:
        nbytes = parse_memory(arguments.size)
    except UsageError:
        raise UsageError(f"--size is {arguments.size!r}, expected a number with a unit, such as 2GB.") from None
    if not folder.is_dir():
        raise UsageError(f"--folder {folder} is not a folder.")
    free = psutil.disk_usage(str(folder)).free
    if nbytes + SPARE_BYTES > free:
        raise UsageError(
            f"{nbytes / 1e9:.1f} GB plus 1 GiB of spare room do not fit in {folder} ({free / 1e9:.1f} GB free). "
            "Choose a smaller --size or another --folder."
        )
    with tempfile.NamedTemporaryFile(dir=folder, prefix="mlx-flash-reads-", suffix=".tmp") as made:
        rng = np.random.default_rng(0)
        with _bytes_bar(nbytes, "writing") as bar:
            for begin in range(0, nbytes, COPY_BYTES):
                made.write(rng.bytes(min(COPY_BYTES, nbytes - begin)))
                bar.update(min(COPY_BYTES, nbytes - begin))
        made.flush()
        os.fsync(made.fileno())
        yield Path(made.name)


def _read_once(path: Path, file: UnitFile) -> None:
    """Reads the whole file, so that the disk's own caches have seen every byte, and drops it from the page cache."""
    pieces = np.arange(0, file.size, COPY_BYTES, dtype=np.int64)
    with Reader(4) as reader, _bytes_bar(file.size, "reading once") as bar:
        memory = np.empty(COPY_BYTES + file.alignment, np.uint8)
        address = memory.ctypes.data + -memory.ctypes.data % file.alignment
        for offset in pieces:
            length = min(COPY_BYTES, file.size - int(offset))
            reader.read(file, np.array([offset]), np.array([address]), np.array([length]))
            bar.update(length)
    if file.direct:
        forget_cached(path)


def _bytes_bar(total: int, name: str) -> tqdm:
    return tqdm(total=total, unit="B", unit_scale=True, desc=name, dynamic_ncols=True)


def _numbers(least: int, most: int) -> Callable[[str], tuple[int, ...]]:
    one = whole_number(least, most)
    return lambda text: tuple(sorted({one(part) for part in text.split(",")}))


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0.001 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.001 and 3600 seconds")
    return value
