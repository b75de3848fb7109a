"""Loading and closing a model repeatedly leaves no thread, no descriptor and no memory behind.

Each test counts in a process of its own that does nothing else. `pytest -m slow tests/faults` loads a thousand times.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from mixtures import make_mixture  # type: ignore[import-not-found]

PROGRAM = """
import ctypes, gc, json, sys
from types import SimpleNamespace
import mlx.core as mx
import psutil
from unittest.mock import patch
from mlx_flash.loading import load as loading, store
class Malloc(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
malloc_says = getattr(ctypes.CDLL(None), "mallinfo2", None)  # glibc's
if malloc_says:
    malloc_says.restype = Malloc
def allocated_bytes():  # all that is allocated and not freed, but Python's own objects; 0 where malloc does not say
    return malloc_says().uordblks + malloc_says().hblkhd if malloc_says else 0
times, *folders = sys.argv[1:]
process, counts = psutil.Process(), []
none = lambda *_: SimpleNamespace()  # a Mock would keep what it is called with
with patch.object(store, "load_tokenizer", none), patch.object(loading, "load_tokenizer", none):
    for folder in folders:
        counts.append([])
        for turn in range(int(times) + 5):
            model, _ = loading.load(folder, memory="2GB", context=64, threads=4)
            mx.eval(model(mx.array([[5, 17, 3]])))
            model.flash.close()
            del model
            gc.collect()
            if turn == 0:
                gc.freeze()  # what the imports made is not looked through again
            if turn >= 4:
                counted = process.num_threads(), process.num_fds(), process.memory_info().rss, allocated_bytes()
                counts[-1].append(counted)
print(json.dumps(counts))
"""
# Limit of the median of allocated and not freed bytes per load; a growing table counts once. A load leaves -6 to 9 kB.
# It left 60 kB each time while the keys of random weights were kept (random_state.py).
MOST_BYTES_A_LOAD = 20e3
MOST_BYTES_RESIDENT = 16e6  # for 1,000 loads, with the pieces that malloc cannot return; 1.3 MB were measured


@pytest.mark.parametrize("times", [10, pytest.param(1000, marks=pytest.mark.slow)])
def test_loads_and_closes_leave_nothing(store: Path, tmp_path: Path, times: int) -> None:
    """Tests a store, and then a mixture."""
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        str(times),
        str(store),
        str(make_mixture(tmp_path / "mixture", "qwen3_moe")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for kind, counts in zip(("store", "mixture"), json.loads(done.stdout), strict=True):
        (threads, descriptors, resident, allocated), *_, then = counts
        assert then[:2] == [threads, descriptors], kind
        grown = f"{(then[2] - resident) / 1e6:.1f} MB more resident, {(then[3] - allocated) / 1e6:.2f} MB allocated"
        print(f"{kind}: {times} loads: {threads} threads, {descriptors} descriptors, {grown}")
        each = [after[3] - before[3] for before, after in pairwise(counts)]
        assert statistics.median(each) < MOST_BYTES_A_LOAD, (kind, each)
        if times == 1000:
            assert then[2] - resident < MOST_BYTES_RESIDENT, (kind, grown)
