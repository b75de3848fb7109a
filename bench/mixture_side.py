"""One side of the comparison on mixtures of experts, in a process of its own: feeds tokens, prints one JSON line."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from mlx_flash.errors import FlashError
from mlx_flash.flash.experts import ExpertStreamer, ExpertTensor
from mlx_flash.flash.pool import AlignedPool
from mlx_flash.flash.reader import Reader, Ticket
from mlx_flash.flash.system import peak_memory_bytes
from mlx_flash.mixture import open_mixture, parent_of
from mlx_flash.mixture_loading import load_mixture, open_files, read_resident
from mlx_flash.stats import Counters

THREADS = 16


class Conveyor:
    """All experts of every layer in turn, over and over; one layer is always on its way, in long reads."""

    def __init__(self, streamer: ExpertStreamer, layers: list[dict[str, ExpertTensor]]) -> None:
        self.streamer, self.layers = streamer, layers
        sizes = {name: t.nbytes * len(t.offsets) for name, t in layers[0].items()}
        self.memory = [{name: AlignedPool(size) for name, size in sizes.items()} for _ in range(2)]
        self.pools = [{name: self._typed(pools[name], layers[0][name]) for name in pools} for pools in self.memory]
        mx.eval(self.pools)
        self.turn = 0
        self.tickets: list[Ticket] = []

    @staticmethod
    def _typed(pool: AlignedPool, tensor: ExpertTensor) -> mx.array:
        return pool.array.view(tensor.dtype).reshape(len(tensor.offsets), *tensor.shape)

    def start(self) -> None:
        pools = self.memory[self.turn % 2]
        for name, tensor in self.layers[self.turn % len(self.layers)].items():
            length = tensor.nbytes
            addresses = pools[name].address + np.arange(len(tensor.offsets), dtype=np.int64) * length
            for number in np.unique(tensor.file_of):
                here = tensor.file_of == number
                reader, file = self.streamer.reader, self.streamer.files[number]
                self.tickets.append(reader.submit(file, tensor.offsets[here], addresses[here], length))

    def take(self) -> dict[str, mx.array]:
        """The next layer's tensors. What was made of the layer before is evaluated: its memory is filled again."""
        if not self.tickets:
            self.start()
        began, counters = time.perf_counter(), self.streamer.counters
        for ticket in self.tickets:
            self.streamer.wait(ticket)
        counters.wait_s += time.perf_counter() - began
        self.tickets = []
        here = self.pools[self.turn % 2]
        self.turn += 1
        self.start()
        return here


class WholeLayer(nn.Module):
    """A switch layer whose experts all come from the disk for every call."""

    def __init__(self, inner: Any, conveyor: Conveyor) -> None:
        super().__init__()
        self._inner, self._conveyor = inner, conveyor

    def settle(self) -> None:
        """Nothing is left to evaluate."""

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        mx.eval(x, indices)  # and with them whatever was made of the layer before
        for name, array in self._conveyor.take().items():
            projection, tensor = name.rsplit(".", 1)
            self._inner[projection][tensor] = array
        y: mx.array = self._inner(x, indices)
        mx.eval(y)
        return y


def load_naive(folder: Path) -> tuple[Any, ExpertStreamer]:
    mixture = open_mixture(folder)
    read_resident(mixture)
    streamer = ExpertStreamer(open_files(mixture.files, direct=True), Reader(THREADS))
    conveyor = Conveyor(streamer, list(mixture.switches.values()))
    for path in mixture.switches:
        parent, name = parent_of(mixture.model, path)
        parent[name] = WholeLayer(parent[name], conveyor)
    return mixture.model, streamer


def say(text: str) -> None:
    print(text, file=sys.stderr)


def main() -> None:
    task: dict[str, Any] = json.loads(sys.argv[1])
    folder, ids, prompt = Path(task["model"]), task["ids"], task["prompt"]
    began = time.perf_counter()
    plan: dict[str, Any] = {}
    close: Callable[[], None] | None = None
    if task["side"] == "flash":
        context = len(ids) + 8
        model = load_mixture(folder, task["memory"], None, THREADS, context, task["io"], say)
        counters = model.flash.streamer.counters
        close, made = model.flash.close, model.flash.plan
        plan = {**made.as_dict(), "slots_per_layer": made.slots[0], "experts": made.units.per_layer}
    elif task["side"] == "naive":
        model, streamer = load_naive(folder)
        counters, close = streamer.counters, streamer.close  # which lets the layer on its way arrive
    else:
        from mlx_lm.utils import load_model

        model = load_model(folder, lazy=task["side"] == "lazy")[0]
        counters = Counters()
    loaded = time.perf_counter() - began
    samples, likeliest, first = decode(model, ids, prompt, counters, task["side"])
    if close is not None:
        close()
    result = {
        "load_s": loaded,
        "prompt": first,
        "samples": samples,
        "likeliest": likeliest,
        "peak_bytes": peak_memory_bytes(),
        "plan": plan,
    }
    print(json.dumps(result))


def decode(
    model: Any, ids: list[int], prompt: int, counters: Counters, name: str
) -> tuple[list[dict[str, float]], list[int], dict[str, float]]:
    """Feeds the prompt at once and the other tokens one by one: figures and the likeliest token after each."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    samples, likeliest = [], []
    calls = [ids[:prompt], *([i] for i in ids[prompt:])]
    first: dict[str, float] = {}
    for number, call in enumerate(tqdm(calls, desc=name, unit="call", dynamic_ncols=True)):
        before, began = counters.copy(), time.perf_counter()
        logits = model(mx.array([call]), cache=cache)[0, -1]
        best = mx.argmax(logits)
        mx.eval(best, [c.state for c in cache])
        total = time.perf_counter() - began
        did = counters - before
        figures = {
            "total_s": total,
            "read_s": did.read_s,
            "wait_s": did.wait_s,
            "manage_s": did.manage_s,
            "bytes": did.bytes,
            "reads": did.reads,
            "hits": did.hits,
            "misses": did.misses,
        }
        if number == 0:
            first = figures
        else:
            samples.append(figures)
        likeliest.append(int(np.array(best)))
    return samples, likeliest, first


if __name__ == "__main__":
    try:
        main()
    except FlashError as error:
        sys.exit(str(error))
