"""One side of a comparison, in a process of its own: loads a store in one way, feeds it given tokens, counts.

The tokens are given, not sampled, so that every side does the same work; the logits tell whether it did.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlx_flash.flash.files import Manifest
from mlx_flash.flash.host_arrays import to_numpy
from mlx_flash.flash.system import current_memory_bytes, peak_memory_bytes

from ..tools import subprocess_json

PART = "mlx_flash.bench.baselines.contenders"
SPARE_BYTES = 64 << 20  # by which the process grows after it was asked what it needs
HALF = 0.5


@dataclass(frozen=True)
class Side:
    """How to run: "naive", "hybrid", "dense" or "flash"; "plan" loads what is least and stops there.

    memory: bytes for the whole process, of flash only; None as in mlx_flash.load. keep: share of the model's bytes that
    hybrid has in memory. look_ahead: as the engine has it, which tries out whether it pays, or all the time, or never.
    """

    name: str
    memory: int | None = None
    keep: float = HALF
    look_ahead: Literal["tried", "always", "never"] = "tried"
    options: dict[str, Any] = field(default_factory=dict)  # of mlx_flash.load


@dataclass(frozen=True)
class Task:
    """What to run: `prompt` tokens at once, then `tokens` one by one, out of `ids`.

    matrices: file of `baselines.write_matrices`, for the baselines. label: for the progress line.
    """

    store: str
    ids: list[int]
    prompt: int
    matrices: str = ""
    label: str = ""

    @property
    def tokens(self) -> int:
        return len(self.ids) - self.prompt


def run(side: Side, task: Task, group: Any = None) -> dict[str, Any]:
    """Runs a side in a child process, in a memory cgroup if one is given. Raises FlashError if it fails.

    Returns "samples": Counters and `total_s` of every token; "top": the most likely token after each; "prompt": the
    prompt's Counters; "plan"; in bytes "weights_bytes", planned to stay in memory, and "peak_memory_bytes",
    of the process (on Linux without what a baseline had while it was loaded).
    """
    return subprocess_json.ask(PART, [asdict(side), asdict(task)], side.name, group)


def _load_least(task: Task, options: dict[str, Any]) -> tuple[Any, int]:
    """The model within the smallest budget, and that budget."""
    from mlx_flash.loading.load import load, plan
    from mlx_flash.loading.plan import ENDLESS

    least = plan(task.store, memory=ENDLESS, **options).smallest
    return load(task.store, memory=least + SPARE_BYTES, **options)[0], least


def _load_baseline(side: Side, task: Task, options: dict[str, Any]) -> tuple[Any, int]:
    """The model and the bytes of its weights in memory.

    "naive" keeps nothing; "hybrid" a share of the model's bytes, what the engine has resident counted in.
    """
    from mlx_flash.loading.dense import compute_dtype

    from .matrices import keep_nothing, keep_some

    model, _ = _load_least(task, {**options, "predictor": "none"})
    manifest, matrices = model.flash.manifest, Path(task.matrices)
    if side.name == "naive":
        return model, keep_nothing(model, Path(task.store), matrices, compute_dtype(manifest.resident_dtype))
    resident, streamed = manifest.files[Manifest.resident_file]["bytes"], manifest.layout.file_bytes
    wanted = streamed if side.name == "dense" else max(0, int(side.keep * (resident + streamed)) - resident)
    kept = keep_some(model, matrices, wanted)
    return model, model.flash.plan.demand.resident + kept


def _load_flash(side: Side, task: Task, options: dict[str, Any]) -> tuple[Any, int]:
    from mlx_flash.loading.load import load

    model, _ = load(task.store, memory=side.memory, **options)
    if side.look_ahead != "tried":
        model.flash.fix_look_ahead(side.look_ahead == "always")
    plan = model.flash.plan
    return model, plan.demand.resident + plan.demand.predictors + plan.slots_bytes


def _forget_peak() -> None:
    """Lets the peak of this process's memory begin anew, where that is possible (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _run_here(side: Side, task: Task) -> dict[str, Any]:
    """The child's work."""
    options = {**side.options, "context": len(task.ids)}
    began = time.perf_counter()
    if side.name == "plan":
        model, least = _load_least(task, options)
        plan = model.flash.plan
        return {
            "smallest_bytes": least,
            "slots": sum(plan.slots),
            "blocks": plan.units.layers * plan.units.per_layer,
            "slot_bytes": plan.slot_bytes,
            "plan": plan.as_dict(),
            "predictor": model.flash.predictor,
        }
    if side.name == "flash":
        model, weights = _load_flash(side, task, options)
    else:
        model, weights = _load_baseline(side, task, options)
        _forget_peak()
    load_s = time.perf_counter() - began
    result = {"side": side.name, "predictor": model.flash.predictor, "load_s": load_s, "weights_bytes": weights}
    result |= _decode(model, task, side.name)
    plan = model.flash.plan
    result |= {
        "memory_bytes": current_memory_bytes(),
        "peak_memory_bytes": peak_memory_bytes(),  # last: asking takes memory, too
        "plan": plan.as_dict(),
        "slot_share": plan.slot_share,
    }
    model.flash.close()
    return result


def _decode(model: Any, task: Task, name: str) -> dict[str, Any]:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from tqdm import tqdm

    cache = make_prompt_cache(model)
    counters = model.flash.streamer.counters
    top, samples = [], []
    began, before = time.perf_counter(), counters.copy()
    if task.prompt:
        model(mx.array([task.ids[: task.prompt]]), cache=cache)
        mx.eval([c.state for c in cache])  # as generation does: nobody asks for the logits inside a prompt
        model.flash.evaluate_guarded()
    prompt_s = time.perf_counter() - began
    prompt = asdict(counters - before)
    for token in tqdm(task.ids[task.prompt :], desc=task.label or name, unit="token", dynamic_ncols=True):
        before = counters.copy()
        began = time.perf_counter()
        logits = to_numpy(model(mx.array([[token]]), cache=cache)[0, -1])
        sample = asdict(counters - before)
        sample["total_s"] = time.perf_counter() - began
        samples.append(sample)
        top.append(int(logits.argmax()))
    return {"prompt_s": prompt_s, "prompt": prompt, "samples": samples, "top": top}


if __name__ == "__main__":
    subprocess_json.answer(lambda side, task: _run_here(Side(**side), Task(**task)))
