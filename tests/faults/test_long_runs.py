"""Long runs: memory, threads and descriptors stay constant. pytest -m faults tests/faults/test_long_runs.py

MLX_FLASH_LONG_RUN=0.1 runs a tenth of it, but 3,000 tokens at least.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from page_browser import running  # type: ignore[import-not-found]

from mlx_flash.bench.soak import chat, sample, thirds

pytestmark = pytest.mark.faults

SHARE = float(os.environ.get("MLX_FLASH_LONG_RUN", "1"))
CHATS = round(1000 * SHARE)  # streamed chats of three turns each
TOKENS = max(3_000, round(10_000 * SHARE))  # The first third must fill the context.
PER_ANSWER = 100
GROWTH = 0.03  # allowed growth of the last third over the middle one; more than an allocator causes


def check_flat(samples: list[dict[str, float]]) -> None:
    """Checks the last two thirds; the first one warms up. Prints the figures."""
    for name in ("rss_bytes", "threads", "files"):
        first, middle, last = thirds([one[name] for one in samples])
        print(f"{name}: {first:,.0f} -> {middle:,.0f} -> {last:,.0f}, median of each third of {len(samples)}")
        assert last <= middle * (1 + GROWTH if name == "rss_bytes" else 1), name


def test_a_thousand_chats(tmp_path: Any) -> None:
    rng = random.Random(1)
    samples = []
    with running(tmp_path / "log") as server, httpx.Client(base_url=server.url, timeout=600) as client:
        assert server.process is not None
        process = psutil.Process(server.process.pid)
        for number in range(CHATS):
            chat(client, rng)
            samples.append(sample(process, number))
        totals = server.get("/stats")["totals"]
        assert totals["requests"] == 3 * CHATS and totals["failed"] == 0
        lines = server.log.read_text()
    print(json.dumps(totals))
    assert "Traceback" not in lines
    check_flat(samples)


def lines() -> Iterator[str]:
    rng = random.Random(2)
    while True:
        yield (
            " ".join(rng.choice(("once", "the", "night", "was", "dark", "and", "he", "said")) for _ in range(9)) + "\n"
        )


def test_ten_thousand_tokens(tmp_path: Any) -> None:
    """Runs one conversation, whose oldest turns are dropped again and again."""
    command = [sys.executable, "-m", "mlx_flash.chat", "--max-tokens", str(PER_ANSWER), "--temp", "1", "--seed", "1"]
    samples: list[dict[str, float]] = []
    with (tmp_path / "said").open("w+") as said, (tmp_path / "errors").open("w+") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=errors, text=True)
        assert process.stdin is not None
        known = psutil.Process(process.pid)
        made = 0
        for line in lines():
            process.stdin.write(line)
            process.stdin.write("/stats\n")
            process.stdin.flush()
            while made == (made := answered(tmp_path / "errors")):
                assert process.poll() is None, errors.read()
            samples.append(sample(known, made))
            if made >= TOKENS:
                break
        process.stdin.close()
        assert process.wait(600) == 0
        assert "Traceback" not in (tmp_path / "errors").read_text()
    print(f"{made} tokens in {len(samples)} answers")
    check_flat(samples)


def answered(errors: Any) -> int:
    """The tokens of all answers so far, from /stats after a moment."""
    import re
    import time

    time.sleep(0.05)
    found = re.findall(r"total of (?:one answer|\d+ answers): (\d+) tokens", errors.read_text())
    return int(found[-1]) if found else 0
