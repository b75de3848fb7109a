"""Times ways to read random pieces of a file: our reader, a plain Python loop, and fio."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mlx_flash.errors import FlashError, ReadError
from mlx_flash.flash.pool import AlignedPool
from mlx_flash.flash.reader import Reader, ReadReport, Ticket
from mlx_flash.flash.unit_file import Int64Array, UnitFile

BATCH_READS = 200  # about the misses of a token in a layer
BATCH_BYTES = 32 << 20  # limit that keeps batches of large pieces small compared with memory
BATCHES_IN_FLIGHT = 3
OFFSETS = 1 << 14  # offsets are drawn in advance, so that drawing them is not timed


@dataclass
class ReadRate:
    """A sample of one method at one piece size and number of threads.

    batch_seconds: time per batch, for methods that drain. cpu_seconds: total of all threads; None if other work ran.
    """

    bytes: int = 0
    seconds: float = 0.0
    reads: int = 0
    cpu_seconds: float | None = None
    batch_seconds: list[float] = field(default_factory=list)

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds


def batch_reads(piece_bytes: int) -> int:
    return max(1, min(BATCH_READS, BATCH_BYTES // piece_bytes))


class Pieces:
    """Random pieces of a file, and a pool like the runtime's to read them into: a ring of BATCHES_IN_FLIGHT batches.

    Offsets are random multiples of the piece size, as in fio. Adjacent pieces are rarely neighbours in a batch, so the
    reader does not merge them (it splits pieces beyond 1.5 MiB itself).
    """

    def __init__(self, file: UnitFile, piece_bytes: int, seed: int) -> None:
        self.file = file
        self.piece_bytes = piece_bytes
        self.reads = batch_reads(piece_bytes)
        self._pool = AlignedPool(BATCHES_IN_FLIGHT * self.reads * piece_bytes)
        self._lengths = np.full(self.reads, piece_bytes, np.int64)
        self.offsets = np.random.default_rng(seed).integers(0, file.size // piece_bytes, OFFSETS) * piece_bytes
        self._batch = 0
        self.use_slots(BATCHES_IN_FLIGHT * self.reads)

    def use_slots(self, slots: int) -> None:
        """Makes the reads use so many destinations in turn.

        fio uses one per thread. So few stay in the cache of the processor or the hypervisor; a model's many slots do
        not.
        """
        places = np.arange(BATCHES_IN_FLIGHT * self.reads) % slots
        # Start in the middle, because the pool's ends are not in huge pages.
        places = (len(places) // 2 + places) % len(places)
        self._addresses = (self._pool.address + places * self.piece_bytes).reshape(BATCHES_IN_FLIGHT, self.reads)

    def place(self, index: int) -> memoryview:
        """The destination of read number `index`."""
        start = int(self._addresses.flat[index % self._addresses.size]) - self._pool.address
        return memoryview(self._pool.array)[start : start + self.piece_bytes]  # type: ignore[arg-type]

    def submit(self, reader: Reader) -> Ticket:
        batch, self._batch = self._batch, self._batch + 1
        start = batch * self.reads % (OFFSETS - self.reads)
        offsets: Int64Array = self.offsets[start : start + self.reads]
        return reader.submit(self.file, offsets, self._addresses[batch % BATCHES_IN_FLIGHT], self._lengths)


def keep_full(reader: Reader, pieces: Pieces, seconds: float) -> ReadRate:
    """Submits the next batch before it waits for the oldest, because fio's threads never wait for each other."""
    pending = deque(pieces.submit(reader) for _ in range(BATCHES_IN_FLIGHT))
    reader.wait(pending.popleft())  # the queue is full from here to the last wait
    sample = ReadRate()
    cpu, began = time.process_time(), time.perf_counter()
    while sample.seconds < seconds:
        pending.append(pieces.submit(reader))
        _count(sample, reader.wait(pending.popleft()), pieces)
        sample.seconds = time.perf_counter() - began
    sample.cpu_seconds = time.process_time() - cpu
    reader.drain()
    return sample


def drain_batches(reader: Reader, pieces: Pieces, seconds: float) -> ReadRate:
    """Reads one batch at a time, like a layer of a token without look-ahead."""
    sample = ReadRate()
    cpu = time.process_time()
    while sample.seconds < seconds:
        began = time.perf_counter()
        _count(sample, reader.wait(pieces.submit(reader)), pieces)
        sample.batch_seconds.append(time.perf_counter() - began)
        sample.seconds += sample.batch_seconds[-1]
    sample.cpu_seconds = time.process_time() - cpu
    return sample


def drain_beside_work(reader: Reader, pieces: Pieces, seconds: float, work_seconds: float) -> ReadRate:
    """Like `drain_batches`, but the submitting thread runs a pure Python loop for `work_seconds` before it waits.

    A batch's time is the reader's own, up to the last byte. It does not include the rest of the loop.
    """
    sample = ReadRate()
    until = time.perf_counter() + 2 * seconds  # the loop may outlast the reads
    while sample.seconds < seconds and time.perf_counter() < until:
        ticket = pieces.submit(reader)
        _compute(time.perf_counter() + work_seconds)
        report = reader.wait(ticket)
        _count(sample, report, pieces)
        sample.batch_seconds.append(report.seconds)
        sample.seconds += report.seconds
    return sample


def _count(sample: ReadRate, report: ReadReport, pieces: Pieces) -> None:
    sample.bytes += report.bytes
    sample.reads += pieces.reads


def _compute(until: float) -> int:
    """Keeps the interpreter busy, like building a graph."""
    total = 0
    while time.perf_counter() < until:
        for i in range(200):
            total += i * i
    return total


def loop_in_python(pieces: Pieces, threads: int, seconds: float, busy: bool) -> ReadRate:
    """Runs `threads` Python threads that call preadv in a loop. If `busy`, the main thread computes meanwhile."""
    start = threading.Barrier(threads + 1)
    stop = threading.Event()
    counts = [0] * threads  # bytes read by each thread
    failures: list[BaseException] = []
    file = pieces.file
    shares = [pieces.offsets[i::threads].tolist() for i in range(threads)]

    def work(index: int) -> None:
        target, count = [pieces.place(index)], 0
        start.wait()
        try:
            for offset in itertools.cycle(shares[index]):
                count += os.preadv(file.fd, target, offset)
                if stop.is_set():
                    break
        except OSError as error:
            failures.append(error)
        counts[index] = count

    workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(threads)]
    for worker in workers:
        worker.start()
    start.wait()
    cpu, began = time.process_time(), time.perf_counter()
    if busy:
        _compute(began + seconds)
    else:
        time.sleep(seconds)
    stop.set()
    for worker in workers:
        worker.join()
    elapsed = time.perf_counter() - began
    if failures:
        raise ReadError(f"{file.path}: {failures[0]}")
    total = sum(counts)
    return ReadRate(total, elapsed, total // pieces.piece_bytes, None if busy else time.process_time() - cpu)


def find_fio() -> str | None:
    return shutil.which("fio")


def run_fio(program: str, path: Path, direct: bool, piece_bytes: int, threads: int, seconds: float) -> ReadRate:
    """Makes the same reads with fio, one at a time in each of its threads. Raises FlashError if fio fails."""
    milliseconds = max(1, round(seconds * 1e3))
    # fio gets huge pages, like our reader. Without them it is two to four times slower here and not a ceiling.
    # glibc's malloc only uses them for large blocks, so a block size of 4 MiB is declared with 0 % of the reads.
    largest = max(piece_bytes, 4 << 20)
    blocks = f"{piece_bytes}/100" + (f":{largest}/0" if largest > piece_bytes else "")
    settings = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    command = [program, "--name=reads", f"--filename={path}", "--readonly", "--rw=randread", f"--direct={direct:d}"]
    command += [
        "--ioengine=psync",
        "--thread",
        f"--bssplit={blocks}",
        "--iomem_align=2m",
        f"--numjobs={threads}",
        "--norandommap",
    ]
    command += ["--randrepeat=0", "--time_based", f"--runtime={milliseconds}ms", "--group_reporting"]
    command += ["--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True, env=settings)
    try:
        job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]  # warnings come before the JSON
        read, elapsed = job["read"], job["read"]["runtime"] * 1e-3
        if done.returncode or job["error"] or not elapsed:
            raise ValueError
    except (ValueError, LookupError):
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise FlashError(f"fio failed (exit code {done.returncode}): {said[0]}. Leave it out with --no-fio.") from None
    cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * elapsed * threads  # fio reports percentages of all threads' time
    return ReadRate(read["io_bytes"], elapsed, read["total_ios"], cpu)
