"""One side of a comparison on a mixture of experts, in a process of its own: feeds it given tokens, counts."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_flash.defaults import IO_MODES, THREADS
from mlx_flash.flash.experts import ExpertFiles
from mlx_flash.flash.host_arrays import to_numpy
from mlx_flash.flash.slot_cache import SlotCache
from mlx_flash.flash.stats import Counters
from mlx_flash.flash.system import peak_memory_bytes
from mlx_flash.layers.experts import StreamedExperts
from mlx_flash.loading.expert_files import open_mixture
from mlx_flash.loading.memory_needs import needs_of
from mlx_flash.loading.mixture import number_of, streamed_layers

from ..tools import subprocess_json
from .whole_layers import load_whole_layers

PART = "mlx_flash.bench.baselines.mixture_contenders"


@dataclass(frozen=True)
class Side:
    """How to run: "resident" or "lazy", which are mlx-lm, "naive", which is every layer whole, or "flash".

    memory: bytes for the whole process; what follows is of flash alone. io, threads, window: as of mlx_flash.load.
    keep: whether experts stay in their slots from one call to the next. overlap: whether those that are there are
    multiplied while others are read. look_ahead: at the next layer's: as the engine has it, which tries out whether it
    pays, or all the time, or never.
    """

    name: str
    memory: int | None = None
    io: str = IO_MODES[0]
    threads: int = THREADS
    window: int | None = None
    keep: bool = True
    overlap: bool = True
    look_ahead: Literal["tried", "always", "never"] = "tried"


@dataclass(frozen=True)
class Task:
    """What to run: `prompt` tokens at once, then the others of `ids` one by one. began: of the process, time.time()."""

    folder: str
    ids: list[int]
    prompt: int
    began: float
    label: str


def examine(folder: str, context: int) -> dict[str, Any]:
    """What a checkpoint holds and the smallest budget for it, asked in a process like those that will run it."""
    from mlx_flash.loading.load import plan
    from mlx_flash.loading.plan import ENDLESS

    smallest = plan(folder, memory=ENDLESS, context=context).smallest
    mixture = open_mixture(Path(folder))
    needs = needs_of(mixture.model, streamed_layers(mixture), context)
    layers = len(mixture.switches)
    experts_bytes = layers * mixture.experts * mixture.expert_bytes
    return {
        "smallest_bytes": smallest,
        "layers": layers,
        "experts": mixture.experts,
        "choices": needs.choices,
        "expert_bytes": mixture.expert_bytes,
        "experts_bytes": experts_bytes,
        "weights_bytes": experts_bytes + sum(array.nbytes for _, array in mixture.resident()),
        "vocabulary": needs.vocabulary,
        "positions": number_of(mixture.config, "max_position_embeddings", context),
        "files": [str(file) for file in mixture.files],
        "synthetic": "synthetic" in mixture.config,
    }


class Forgetful(SlotCache):
    """Slots that keep nothing from one call to the next: whatever a call needs is read for it."""

    def mark_used(self, units: np.ndarray) -> int:
        self.slot_of[:] = self.unit_of[:] = -1
        self.resident = 0
        return super().mark_used(units)


def wait_for_all(layer: StreamedExperts) -> None:
    """Lets a layer read what it lacks before it multiplies anything, where its slots allow that."""
    units, groups = layer.units, layer.units.groups
    units.groups = (  # type: ignore[method-assign]
        lambda experts, at_once: [experts] if len(experts) <= units.cache.slots else groups(experts, at_once)
    )


def load_side(side: Side, folder: Path, context: int) -> tuple[Any, ExpertFiles | None]:
    """The model, and what reads its experts, if anything of ours does."""
    from mlx_flash.loading.load import load
    from mlx_flash.text.tokenizer import load_tokenizer

    if side.name == "flash":
        options: dict[str, Any] = {"window": side.window, "threads": side.threads, "io": side.io}
        model, _ = load(folder, memory=side.memory, context=context, **options)
        if not side.keep:
            for layer in model.flash.layers:
                cache = layer.units.cache
                layer.units.cache = Forgetful(len(cache.slot_of), cache.slots, side.window)
        for layer in model.flash.layers:
            if not side.overlap:
                wait_for_all(layer)
        if side.look_ahead != "tried":
            model.flash.fix_look_ahead(side.look_ahead == "always")
        return model, model.flash.streamer
    load_tokenizer(folder)  # as above
    if side.name == "naive":
        return load_whole_layers(folder)
    from mlx_lm.utils import load_model

    return load_model(folder, lazy=side.name == "lazy")[0], None


def run_here(side: Side, task: Task) -> dict[str, Any]:
    """The child's work: see `mixture.Subject.run`."""
    began = time.perf_counter()
    model, streamer = load_side(side, Path(task.folder), len(task.ids))
    result: dict[str, Any] = {"load_s": time.perf_counter() - began}
    result |= decode(model, task, Counters() if streamer is None else streamer.counters)
    if streamer is not None:
        streamer.close()
    if side.name == "flash":
        plan = model.flash.plan
        result |= {"plan": plan.as_dict(), "slots": list(plan.slots), "slot_share": plan.slot_share}
    result["written_bytes"] = written_bytes()
    result["peak_memory_bytes"] = peak_memory_bytes()  # last: asking takes memory, too
    return result


def decode(model: Any, task: Task, counters: Counters) -> dict[str, Any]:
    """Feeds the prompt at once and the other tokens one by one: figures and the likeliest token after each."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    samples, likeliest = [], []
    first_token_s = 0.0
    calls = [task.ids[: task.prompt], *([i] for i in task.ids[task.prompt :])]
    for call in tqdm(calls, desc=task.label, unit="call", dynamic_ncols=True):
        before, began = counters.copy(), time.perf_counter()
        best = mx.argmax(model(mx.array([call]), cache=cache)[0, -1])
        mx.eval(best, [c.state for c in cache])
        total = time.perf_counter() - began
        samples.append(asdict(counters - before) | {"total_s": total})
        likeliest.append(int(to_numpy(best).item()))
        first_token_s = first_token_s or time.time() - task.began
    return {"prompt": samples[0], "samples": samples[1:], "likeliest": likeliest, "first_token_s": first_token_s}


def written_bytes() -> int | None:
    """What this process has caused to be written to a disk; None where the system does not say (macOS).

    Standard error counts where it goes to a file.
    """
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("write_bytes:")), None)


def respond(question: str, first: Any, second: Any) -> dict[str, Any]:
    if question == "examine":
        return examine(first, second)
    return run_here(Side(**first), Task(**second))


if __name__ == "__main__":
    subprocess_json.answer(respond)
