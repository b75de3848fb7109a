"""One contender of a comparison: a process that loads a model in one way, runs given tokens and counts.

The tokens are given, not sampled. Every contender therefore does the same work, and its likeliest tokens show that.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from mlx_flash.flash.files import Manifest, read_manifest
from mlx_flash.flash.host_arrays import to_numpy
from mlx_flash.flash.stats import Counters
from mlx_flash.flash.system import peak_memory_bytes
from mlx_flash.flash.trials import Trials
from mlx_flash.loading.config import holds_mixture

from ..synthetic.neuron_store import is_synthetic, shape_label
from ..tools import subprocess_json
from .engine_switches import keep_nothing_between_calls

PART = "mlx_flash.bench.baselines.contenders"
SPARE_BYTES = 64 << 20  # room for the growth of the process after its plan has been made
HALF = 0.5


@dataclass(frozen=True)
class Contender:
    """How to run a model.

    name: "naive", "hybrid", "dense" or "flash" for a model with streamed neurons. For a mixture of experts,
    "resident" or "lazy", which are mlx-lm's loading, "naive", which reads every layer whole, or "flash".
    held: share of the model's bytes that "hybrid" keeps in memory.

    The other fields apply to "flash" only.
    memory: bytes for the whole process, as in `mlx_flash.load`.
    options: more arguments of `mlx_flash.load`.
    look_ahead: "tried" lets the engine find out whether guessing pays.
    keep: whether experts keep their slots between calls.
    overlap: whether experts are multiplied while others are still being read.
    """

    name: str
    memory: int | None = None
    held: float = HALF
    look_ahead: Literal["tried", "always", "never"] = "tried"
    keep: bool = True
    overlap: bool = True
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """The tokens to run: the first `prompt` of `ids` in one call, then the others one by one.

    matrices: file of `matrices.write_matrices`, for the baselines. label: text of the progress line. began: start of
    the task by time.time(), before the process exists.
    """

    folder: str
    ids: list[int]
    prompt: int
    matrices: str = ""
    label: str = ""
    began: float = 0.0


@dataclass
class Loaded:
    """A model that is ready to run. told: fields that loading adds to the result. trials: told of decoded tokens."""

    model: Any
    counters: Counters = field(default_factory=Counters)
    close: Callable[[], None] = lambda: None
    told: dict[str, Any] = field(default_factory=dict)
    trials: Trials = field(default_factory=Trials)


def run(contender: Contender, task: Task, group: Any = None) -> dict[str, Any]:
    """Runs a contender in a child process, in a memory cgroup if one is given. Raises FlashError if it fails.

    Returns "samples", the Counters and `total_s` of every token; "prompt", the same for the prompt; "likeliest", the
    most likely token after each call; "written_bytes" and "peak_memory_bytes" of the process. A model with streamed
    neurons adds "weights_bytes", the bytes planned to stay in memory. "flash" adds its plan and its slots.
    """
    return subprocess_json.ask(PART, ("run", asdict(contender), asdict(task)), contender.name, group)


def ask_about(folder: Path, context: int) -> dict[str, Any]:
    """Runs `examine` on a model in a process like those that will run it."""
    return subprocess_json.ask(PART, ("examine", str(folder), context), "examine")


def respond(question: str, first: Any, second: Any) -> dict[str, Any]:
    """Answers `ask_about` or `run` in the child process."""
    if question == "examine":
        return examine(Path(first), second)
    return run_here(Contender(**first), Task(**second))


# -- examining a model ---------------------------------------------------------------------------------------


def examine(folder: Path, context: int) -> dict[str, Any]:
    """The sizes of a model and its smallest budget. "told" goes into every result. Reads no weights."""
    from mlx_flash.loading.load import plan
    from mlx_flash.loading.plan import ENDLESS

    planned = plan(folder, memory=ENDLESS, context=context)
    units = planned.units
    about = {
        "smallest_bytes": planned.smallest,
        "layers": units.layers,
        "units": units.per_layer,
        "least_units": units.least,
        "unit_bytes": planned.slot_bytes,
        "process_bytes": planned.demand.process,
        "resident_bytes": planned.demand.resident,
        "predictor_bytes": planned.demand.predictors,
    }
    return about | (_about_experts if holds_mixture(folder) else _about_neurons)(folder, context)


def _about_neurons(folder: Path, context: int) -> dict[str, Any]:
    manifest, config = read_manifest(folder), json.loads((folder / "config.json").read_text())
    names = [Manifest.resident_file, *map(Manifest.predictor_file, manifest.predictors)]
    return {
        "streamed_bytes": manifest.layout.file_bytes,
        "streamed": [str(folder / Manifest.neurons_file)],
        "other_files": [str(folder / name) for name in names],
        "vocabulary": config["vocab_size"],
        "positions": config.get("max_position_embeddings", context),
        "told": {
            "model": shape_label(manifest) or folder.resolve().name,
            "synthetic": is_synthetic(manifest),
            "store": folder.name,
            "predictor": manifest.default_predictor,
        },
    }


def _about_experts(folder: Path, context: int) -> dict[str, Any]:
    from mlx_flash.loading.config import number_of
    from mlx_flash.loading.in_place_loading import streamed_layers
    from mlx_flash.loading.in_place_model import open_in_place
    from mlx_flash.loading.memory_needs import needs_of

    mixture = open_in_place(folder)
    needs = needs_of(mixture.model, streamed_layers(mixture), context)
    layers, synthetic = len(mixture.switches), "synthetic" in mixture.config
    experts_bytes = layers * mixture.experts * mixture.expert_bytes
    return {
        "streamed_bytes": experts_bytes,
        "streamed": [str(file) for file in sorted(mixture.files, key=lambda path: -path.stat().st_size)],
        "other_files": [],
        "choices": needs.choices,
        "vocabulary": needs.vocabulary,
        "positions": number_of(mixture.config, "max_position_embeddings") or context,
        "told": {
            "model": folder.resolve().name + (" (synthetic weights and routing)" if synthetic else ""),
            "synthetic": synthetic,
            "layers": layers,
            "experts": mixture.experts,
            "experts_bytes": experts_bytes,
            "expert_bytes": mixture.expert_bytes,
            "choices": needs.choices,
        },
    }


# -- loading -------------------------------------------------------------------------------------------------


def load_contender(contender: Contender, task: Task, experts: bool) -> Loaded:
    """Loads the model in the contender's way. experts: whether the model is a mixture of experts."""
    if contender.name == "flash":
        return _load_flash(contender, task)
    return _load_other_experts(contender, Path(task.folder)) if experts else _load_other_neurons(contender, task)


def _load_flash(contender: Contender, task: Task) -> Loaded:
    from mlx_flash.loading.load import load

    model, _ = load(task.folder, memory=contender.memory, context=len(task.ids), trials=False, **contender.options)
    if not contender.keep:
        keep_nothing_between_calls(model, contender.options.get("window"))
    if not contender.overlap:
        model.flash.streamer.overlap = False
    trial = model.flash.trials.get("lookahead")
    if contender.look_ahead != "tried":
        model.flash.fix_look_ahead(contender.look_ahead == "always")
    elif trial is not None:
        trial.fixed = False
        model.flash.trials = Trials([trial])
    plan = model.flash.plan
    told = {"plan": plan.as_dict(), "slots": list(plan.slots), "slot_share": plan.slot_share}
    told["weights_bytes"] = plan.demand.resident + plan.demand.predictors + plan.slots_bytes
    return Loaded(model, model.flash.streamer.counters, model.flash.close, told, model.flash.trials)


def _load_least(folder: str, context: int, options: dict[str, Any]) -> Any:
    """Loads the model within its smallest budget."""
    from mlx_flash.loading.load import load, plan
    from mlx_flash.loading.plan import ENDLESS

    options = {**options, "context": context, "predictor": "none"}
    least = plan(folder, memory=ENDLESS, **options).smallest
    return load(folder, memory=least + SPARE_BYTES, **options)[0]


def _load_other_neurons(contender: Contender, task: Task) -> Loaded:
    """Loads a baseline. The share of the model's bytes that "hybrid" keeps includes the resident weights."""
    from mlx_flash.loading.dense import compute_dtype

    from .matrices import keep_nothing, keep_some

    model = _load_least(task.folder, len(task.ids), contender.options)
    manifest, matrices = model.flash.manifest, Path(task.matrices)
    if contender.name == "naive":
        dtype = compute_dtype(manifest.resident_dtype)
        weights_bytes = keep_nothing(model, Path(task.folder), matrices, dtype)
    else:
        resident, streamed = manifest.files[Manifest.resident_file]["bytes"], manifest.layout.file_bytes
        wanted = max(0, int(contender.held * (resident + streamed)) - resident)
        kept = keep_some(model, matrices, streamed if contender.name == "dense" else wanted)
        weights_bytes = model.flash.plan.demand.resident + kept
    _forget_peak()
    return Loaded(model, model.flash.streamer.counters, model.flash.close, {"weights_bytes": weights_bytes})


def _load_other_experts(contender: Contender, folder: Path) -> Loaded:
    from mlx_flash.text.tokenizer import load_tokenizer

    load_tokenizer(folder)  # "flash" also loads it
    if contender.name == "naive":
        from .whole_layers import load_whole_layers

        model, streamer = load_whole_layers(folder)
        return Loaded(model, streamer.counters, streamer.close)
    from mlx_lm.utils import load_model

    return Loaded(load_model(folder, lazy=contender.name == "lazy")[0])


def _forget_peak() -> None:
    """Resets the peak of this process's memory where that is possible (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


# -- running -------------------------------------------------------------------------------------------------


def run_here(contender: Contender, task: Task) -> dict[str, Any]:
    """Runs a contender in this process. Returns the result of `run`."""
    began = time.perf_counter()
    experts = holds_mixture(Path(task.folder))
    loaded = load_contender(contender, task, experts)
    result: dict[str, Any] = {"load_s": time.perf_counter() - began, **loaded.told}
    result |= decode(loaded, task, answers_prompt=experts)
    loaded.close()
    result["written_bytes"] = written_bytes()
    result["peak_memory_bytes"] = peak_memory_bytes()  # comes last, because the lines above take memory
    return result


def decode(loaded: Loaded, task: Task, answers_prompt: bool) -> dict[str, Any]:
    """Runs the prompt in one call and the other tokens one by one. Returns figures and likeliest tokens.

    answers_prompt: whether to compute the logits after the prompt. Generation computes them once, after the last chunk
    of a prompt.
    """
    from mlx_lm.models.cache import make_prompt_cache
    from tqdm import tqdm

    cache = make_prompt_cache(loaded.model)
    samples, likeliest = [], []
    first_token_s = None
    calls = [task.ids[: task.prompt], *([token] for token in task.ids[task.prompt :])]
    for turn, call in enumerate(tqdm(calls, desc=task.label, unit="call", dynamic_ncols=True)):
        before, began = loaded.counters.copy(), time.perf_counter()
        logits = loaded.model(mx.array([call]), cache=cache)
        if turn or answers_prompt:
            best = mx.argmax(logits[0, -1])
            mx.eval(best, [c.state for c in cache])
            likeliest.append(int(to_numpy(best).item()))
            first_token_s = first_token_s or time.time() - task.began
        else:
            mx.eval([c.state for c in cache])
            loaded.model.flash.evaluate_guarded()
        used, seconds = loaded.counters - before, time.perf_counter() - began
        samples.append(as_printed(used) | {"total_s": seconds})
        if turn:
            loaded.trials.took(1, 1, seconds, used.misses)
    return {"prompt": samples[0], "samples": samples[1:], "likeliest": likeliest, "first_token_s": first_token_s}


def as_printed(counters: Counters) -> dict[str, Any]:
    """Counters under their names in the results."""
    fields = asdict(counters)
    return fields | {"early": fields.pop("prefetched_used"), "vain": fields.pop("prefetched_unused")}


def written_bytes() -> int | None:
    """The bytes that this process has written to a disk; None if the system does not count them (macOS).

    Standard error counts if it goes to a file.
    """
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("write_bytes:")), None)


if __name__ == "__main__":
    subprocess_json.answer(respond)
