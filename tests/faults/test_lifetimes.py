"""Loading and closing a model again and again leaves no thread, no descriptor and no memory behind.

Counted in a process of its own, in which nothing else happens. `pytest -m slow tests/faults` does so a thousand times.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mixtures import make_mixture  # type: ignore[import-not-found]

PROGRAM = """
import gc, json, sys
import mlx.core as mx
import psutil
from unittest.mock import patch
from mlx_flash import loading
times, *folders = sys.argv[1:]
process, counts = psutil.Process(), []
with patch.object(loading, "load_tokenizer"):  # a library's own
    for folder in folders:
        for turn in range(int(times) + 5):
            model, _ = loading.load(folder, memory="2GB", context=64, threads=4)
            mx.eval(model(mx.array([[5, 17, 3]])))
            model.flash.close()
            del model
            gc.collect()
            if turn == 0:
                gc.freeze()  # what the imports made is not looked through again
            if turn in (4, int(times) + 4):
                counts.append((process.num_threads(), process.num_fds(), process.memory_info().rss))
print(json.dumps(counts))
"""


@pytest.mark.parametrize("times", [10, pytest.param(1000, marks=pytest.mark.slow)])
def test_loads_and_closes_leave_nothing(store: Path, tmp_path: Path, times: int) -> None:
    """Of a store, and then of a mixture."""
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        str(times),
        str(store),
        str(make_mixture(tmp_path / "mixture", "qwen3_moe")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    counts = json.loads(done.stdout)
    for kind, before, after in zip(("store", "mixture"), counts[::2], counts[1::2], strict=True):
        (threads, descriptors, memory), (threads_then, descriptors_then, memory_then) = before, after
        assert (threads_then, descriptors_then) == (threads, descriptors), kind
        grown = f"{(memory_then - memory) / 1e6:.1f} MB more"
        print(f"{kind}: {times} loads: {threads} threads, {descriptors} descriptors, {grown}")
        if times == 1000:
            assert memory_then - memory < 64e6, (kind, grown)
