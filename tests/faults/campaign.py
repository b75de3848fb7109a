"""Injects faults into reading, loading, converting and serving, and counts their results.

    python tests/faults/campaign.py                 # every job, 100 faults each: an hour or more
    python tests/faults/campaign.py --runs 1000 decode-silent convert-partial
    python tests/faults/campaign.py --seed 7        # other faults

Needs Linux and a C compiler. Prints a table and, as the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from faults import environment  # type: ignore[import-not-found]  # found beside this file

RESULTS = ("right", "clear", "unnamed", "wrong", "hang", "traceback")
BAD = ("unnamed", "wrong", "hang", "traceback")
JOBS = (
    *("decode", "decode-silent", "load", "load-silent", "serve", "change", "interrupt"),
    *("convert-checkpoint", "convert-partial", "convert-write", "convert-sync", "kill"),
)
INJECTED = "injected"  # key of the counts: the number of faults
SILENCE_S = 300  # a worker that is silent for so long has hung


def run(
    job: str, runs: int, seed: int, work: Path, model: Path | None = None
) -> tuple[Counter[str], list[dict[str, str]]]:
    """(counts of faults and results, failed runs) of one job. A fault that hits no call is not counted.

    model: the store to read; None: the demo model's.
    """
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), job, str(seed), str(runs), str(work / job)]
    (work / job).mkdir()
    changes = {"MLX_FLASH_CACHE": os.environ.get("MLX_FLASH_CACHE", str(work / "cache"))}
    if model is not None:
        changes["FAULTS_MODEL"] = str(model)
    counts: Counter[str] = Counter()
    bad = []
    errors = work / f"{job}.stderr"
    with errors.open("w") as stderr, subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment(**changes)
    ) as child:  # fmt: skip
        lines: queue.Queue[str | None] = queue.Queue()

        threading.Thread(target=_pump, args=(child.stdout, lines), daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=SILENCE_S)
            except queue.Empty:
                child.kill()
                counts["hang"] += 1
                bad.append({"kind": "?", "result": "hang", "detail": errors.read_text()[-300:]})
                return counts, bad
            if line is None:
                break
            each = json.loads(line)
            if each["injected"]:
                counts[INJECTED] += 1
                counts[each["result"]] += 1
                if each["result"] in BAD:
                    bad.append(each)
    if child.returncode:
        counts["traceback"] += 1
        bad.append(
            {"kind": "?", "result": f"worker: exit code {child.returncode}", "detail": errors.read_text()[-900:]}
        )
    return counts, bad


def _pump(source: Iterable[str], lines: queue.Queue[str | None]) -> None:
    with contextlib.suppress(ValueError):  # the pipe is closed, because the worker was killed
        for line in source:
            lines.put(line)
    lines.put(None)


def row_of(job: str, counts: Mapping[str, object]) -> str:
    """A row of the table: the number of injected faults, and the number with each result."""
    cells = " ".join(f"{counts.get(name, 0):>9}" for name in RESULTS)
    return f"{job:<20} {counts.get(INJECTED, 0):>7} {cells}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"of {', '.join(JOBS)} (default: all)")
    counted = "faults per job; those that no call meets are not counted (default: %(default)s)"
    parser.add_argument("--runs", type=int, default=100, metavar="N", help=counted)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="chooses other faults (default: %(default)s)")
    arguments = parser.parse_args()
    if unknown := [job for job in arguments.jobs if job not in JOBS]:
        parser.error(f"there is no job {unknown[0]!r}; expected some of {', '.join(JOBS)}")
    table = {}
    print(row_of("job", {INJECTED: "faults"} | {name: name for name in RESULTS}))
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        for job in arguments.jobs or JOBS:
            counts, bad = run(job, arguments.runs, arguments.seed, Path(folder))
            table[job] = dict(counts)
            print(row_of(job, counts), flush=True)
            for each in bad[:10]:
                print(f"    {each['kind']}: {each['result']}: {each['detail']}", file=sys.stderr)
    print(json.dumps({"runs": arguments.runs, "seed": arguments.seed, "jobs": table}))
    return int(any(counts.get(name) for counts in table.values() for name in BAD))


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    sys.exit(main())
