"""Faults of ranks: `mlxflash generate --ranks 3` and one of its processes killed or stopped at some moment.

`python tests/rank_faults.py` prints the table of what happens then; `--rounds 20` injects random ones instead.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mixtures import make_mixture  # type: ignore[import-not-found]
from processes import has_ended  # type: ignore[import-not-found]

MOMENTS = ("starting", "loading", "generating")
KINDS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
MOST_S = {"starting": 30.0, "loading": 10.0, "generating": 10.0}  # from a fault to the end; a start may take 20 s
PATIENCE_S = 120.0


@dataclass(frozen=True)
class RankFault:
    """rank: of the process. kind: of KINDS. moment: of MOMENTS. later_s: after the moment."""

    rank: int
    kind: str
    moment: str
    later_s: float = 0.0

    def __str__(self) -> str:
        return f"rank {self.rank} is {self.kind} while {self.moment}"


@dataclass(frozen=True)
class RankOutcome:
    """code: rank 0's exit code. seconds: from the fault to the end of all. left: processes that had to be killed."""

    code: int
    seconds: float
    said: str
    left: int

    def problem(self, fault: RankFault) -> str:
        """What is wrong about it; empty if nothing is."""
        if self.left:
            return f"{self.left} processes are left"
        if fault.rank and self.code != 1:
            return f"the exit code is {self.code}"
        if fault.rank and f"rank {fault.rank}" not in self.said:
            return f"no sentence names the rank: {self.said!r}"
        return ""


def tiny_mixture(folder: Path) -> Path:
    path = make_mixture(folder, "qwen3_moe", num_experts=16, num_hidden_layers=2)
    write_tokenizer(path)
    return Path(path)


def command_of(model: Path, ranks: int, *more: str) -> list[str]:
    flags = ["--model", str(model), "--memory", "1GB", "--max-tokens", "100000", "--ranks", str(ranks)]
    return [sys.executable, "-m", "mlx_flash.generate", *flags, *more]


class RunningRanks:
    """A generation over several ranks."""

    def __init__(self, model: Path, ranks: int) -> None:
        self._ranks = ranks
        self._reached = {moment: threading.Event() for moment in MOMENTS}
        self._lines: list[str] = []
        self.process = subprocess.Popen(
            command_of(model, ranks), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._readers = [threading.Thread(target=each, daemon=True) for each in (self._output, self._errors)]
        for reader in self._readers:
            reader.start()

    def all(self) -> list[psutil.Process]:
        """Rank 0 and those of the others that have been started, in order, once all have."""
        own = psutil.Process(self.process.pid)
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until and self.process.poll() is None:
            others = [each for each in own.children() if _is_rank(each)]
            if len(others) == self._ranks - 1:
                return [own, *sorted(others, key=lambda each: each.pid)]
            time.sleep(0.01)
        raise AssertionError("\n".join(self._lines))

    def wait(self, moment: str) -> None:
        assert self._reached[moment].wait(PATIENCE_S), self._lines

    def said(self) -> list[str]:
        """What was printed on standard error, once it has ended."""
        for reader in self._readers:
            reader.join(PATIENCE_S)
        return self._lines

    def _output(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            while stream.read(1):
                self._reached["generating"].set()
        self._reached["generating"].set()  # It has ended.

    def _errors(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stream:
            for line in stream:
                self._lines.append(line.decode(errors="replace").rstrip())
                if "memory plan" in self._lines[-1]:
                    self._reached["loading"].set()
        self._reached["loading"].set()


@contextlib.contextmanager
def running(model: Path, ranks: int) -> Iterator[RunningRanks]:
    run = RunningRanks(model, ranks)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait()
        run.said()


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "mlx_flash.rank" in process.cmdline()
    return False


def inject(model: Path, fault: RankFault, ranks: int = 3) -> RankOutcome:
    with running(model, ranks) as run:
        processes = run.all()
        if fault.moment != "starting":
            run.wait(fault.moment)
        time.sleep(fault.later_s)
        began = time.monotonic()
        hit = processes[fault.rank]
        with contextlib.suppress(psutil.NoSuchProcess):
            hit.send_signal(KINDS[fault.kind])
        others = [each for each in processes if each is not hit]
        left = _those_left(others)
        seconds = time.monotonic() - began
        if fault.rank == 0 and fault.kind == "stopped":
            hit.send_signal(signal.SIGCONT)
        left += _those_left([hit])
        for each in left:
            each.kill()
        code = run.process.wait(PATIENCE_S)
        said = next((line for line in reversed(run.said()) if line.startswith("python -m ")), "")
        return RankOutcome(code, seconds, said, len(left))


def _those_left(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that do not end. psutil's own waiting does not see that a zombie has ended."""
    until = time.monotonic() + PATIENCE_S
    while (left := [each for each in processes if not has_ended(each)]) and time.monotonic() < until:
        time.sleep(0.02)
    return left


def random_faults(count: int, seed: int = 0) -> list[RankFault]:
    """The same for the same seed."""
    source = random.Random(seed)
    return [
        RankFault(source.randrange(3), source.choice([*KINDS]), source.choice(MOMENTS), round(source.random(), 3))
        for _ in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, help="random faults (default: each kind at each moment)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    faults = [RankFault(rank, kind, moment, 0.2) for rank in (2, 0) for kind in KINDS for moment in MOMENTS]
    if arguments.rounds:
        faults = random_faults(arguments.rounds, arguments.seed)
    bad = 0
    print("| fault | exit code of rank 0 | all others ended after | what it says |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_mixture(Path(folder) / "model")
        for fault in faults:
            found = inject(model, fault)
            problem = found.problem(fault) or ("" if found.seconds <= MOST_S[fault.moment] else "too late")
            bad += bool(problem)
            said = found.said.partition(": ")[2] if ": " in found.said else found.said
            print(f"| {fault} | {found.code} | {found.seconds:.1f} s | {said} {problem} |", flush=True)
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
