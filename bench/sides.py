"""One side of a comparison, in a process of its own: loads a store in one way, feeds it given tokens, counts.

The tokens are given, not sampled, so that every side does the same work; the logits tell whether it did.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlx_flash.errors import BudgetError, FlashError
from mlx_flash.flash.files import Manifest

PART = "mlx_flash.bench.sides"
SPARE_BYTES = 64 << 20  # by which the process grows after it was asked what it needs


@dataclass(frozen=True)
class Side:
    """How to run: "naive", "hybrid", "dense" or "flash". memory: bytes for the whole process, of flash only."""

    name: str
    memory: int | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of mlx_flash.load


@dataclass(frozen=True)
class Task:
    """What to run: `prompt` tokens at once, then `tokens` one by one, out of `ids`.

    matrices: file of `baselines.write_matrices`, for the baselines.
    """

    store: str
    ids: list[int]
    prompt: int
    matrices: str = ""

    @property
    def tokens(self) -> int:
        return len(self.ids) - self.prompt


def run(side: Side, task: Task, group: Any = None) -> dict[str, Any]:
    """Runs a side in a child process, in a memory cgroup if one is given. Raises FlashError if it fails."""
    command = [sys.executable, "-m", PART, json.dumps([asdict(side), asdict(task)])]
    if group is None:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    else:
        done = group.run(command, dict(os.environ))
    if done.returncode != 0:
        killed = f", killed by the kernel {group.kills()} times" if group is not None else ""
        raise FlashError(f"the side {side.name} ended with exit code {done.returncode}{killed}.")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _load_baseline(side: Side, task: Task) -> Any:
    """ "naive" keeps nothing; "hybrid" half of the model's bytes, what the engine has resident counted in."""
    from mlx_flash.loading import load

    from .baselines import keep_nothing, keep_some

    options = {**side.options, "predictor": "none", "context": len(task.ids)}
    try:
        load(task.store, memory=1, **options)
    except BudgetError as error:
        model, tokenizer = load(task.store, memory=error.smallest_bytes + SPARE_BYTES, **options)
    folder, matrices = Path(task.store), Path(task.matrices)
    if side.name == "naive":
        keep_nothing(model, folder, matrices)
    elif side.name == "hybrid":
        manifest = model.flash.manifest
        resident = manifest.files[Manifest.resident_file]["bytes"]
        keep_some(model, matrices, max(0, (resident + manifest.layout.file_bytes) // 2 - resident))
    else:
        keep_some(model, matrices, model.flash.manifest.layout.file_bytes)
    return model, tokenizer


def _run_here(side: Side, task: Task) -> dict[str, Any]:
    """The child's work."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from tqdm import tqdm

    from mlx_flash.flash.system import peak_memory_bytes
    from mlx_flash.loading import load

    began = time.perf_counter()
    if side.name == "flash":
        model, _ = load(task.store, memory=side.memory, context=len(task.ids), **side.options)
    else:
        model, _ = _load_baseline(side, task)
    loaded = time.perf_counter()
    cache = make_prompt_cache(model)
    counters = model.flash.streamer.counters
    top, samples = [], []
    before = counters.copy()
    if task.prompt:
        mx.eval(model(mx.array([task.ids[: task.prompt]]), cache=cache))
    prompt_s = time.perf_counter() - loaded
    prompt_counters = counters - before
    for token in tqdm(task.ids[task.prompt :], desc=side.name, unit="token", dynamic_ncols=True):
        before = counters.copy()
        began_token = time.perf_counter()
        logits = np.array(model(mx.array([[token]]), cache=cache)[0, -1])
        sample = asdict(counters - before)
        sample["total_s"] = time.perf_counter() - began_token
        samples.append(sample)
        top.append(int(logits.argmax()))
    plan = model.flash.plan
    result = {
        "side": side.name,
        "predictor": model.flash.predictor,
        "load_s": loaded - began,
        "prompt_s": prompt_s,
        "prompt": asdict(prompt_counters),
        "samples": samples,
        "top": top,
        "peak_memory_bytes": peak_memory_bytes(),
        "plan": plan.as_dict(),
        "slot_share": plan.slot_share,
    }
    model.flash.close()
    return result


if __name__ == "__main__":
    given_side, given_task = json.loads(sys.argv[1])
    print(json.dumps(_run_here(Side(**given_side), Task(**given_task))))
