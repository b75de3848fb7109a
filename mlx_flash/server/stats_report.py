"""The answer of /stats: the model, the plan, memory and speed. All sizes are in bytes."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from ..flash.swap import swap_counters
from ..flash.system import current_memory_bytes, peak_memory_bytes
from .engine import Engine
from .loaded_model import LoadedModel
from .monitor import NO_TOTALS

KINDS = {"router": "experts", "every layer": "layers"}  # by the runtime's predictor
NO_MODEL = dict.fromkeys(("model", "plan", "choices", "prompt_caches", "resident", "given_back", "last", "now"))


def statistics(engine: Engine) -> dict[str, Any]:
    """The answer of /stats. What belongs to a model is null while none is loaded."""
    switch = engine.switch
    loaded = switch.loaded
    return {
        **(NO_MODEL if loaded is None else _of_model(engine, loaded)),
        "memory": {
            "current_bytes": current_memory_bytes(),
            "peak_bytes": peak_memory_bytes(),
            "budget_bytes": switch.budget_bytes,
            "swap": asdict(swap_counters() - engine.swap_at_start),
        },
        "totals": switch.totals or NO_TOTALS,
        "queue": {
            "waiting": engine.waiting,
            "limit": engine.places.limit,
            "running": len(engine.running),
            "parallel": engine.parallel,
        },
        "uptime_s": time.monotonic() - engine.started,
        "state": switch.state,
        "library": {
            "loading": switch.progress,
            "loads": switch.loads,
            "unloads": switch.unloads,
            "idle_unload_s": engine.idle_unload_s,
        },
    }


def _of_model(engine: Engine, loaded: LoadedModel) -> dict[str, Any]:
    flash, monitor = loaded.model.flash, loaded.monitor
    assert monitor is not None
    units = flash.plan.units
    resident = monitor.live.resident
    return {
        "model": {
            "id": engine.name,
            "path": engine.path,
            "kind": KINDS.get(flash.predictor, "neurons"),
            "layers": units.layers,
            "units_per_layer": units.per_layer,
            "unit_size": 1 if flash.manifest is None else flash.manifest.layout.neurons_per_block,
            "parameters_bytes": parameters_bytes(flash),
            "sampling": flash.defaults.sampling,
            "images": flash.images is not None,
            "adapter": None if flash.adapter is None else str(flash.adapter),
            "thinks": loaded.format.thinks,
        },
        "plan": {**flash.plan.as_dict(), "context": flash.plan.context},
        "choices": flash.trials.choices(),
        "prompt_caches": asdict(loaded.turns.statistics()),
        "resident": {
            "slots": monitor.live.slots,
            "units": resident,
            "share": sum(resident) / (units.layers * units.per_layer),
        },
        "given_back": {
            "now_bytes": flash.keeper.given_bytes,
            "given_bytes": flash.streamer.counters.given_back,
            "taken_bytes": flash.streamer.counters.taken_again,
            "pressure": flash.keeper.level.name.lower(),
        },
        "last": monitor.last,
        "now": monitor.now,
    }


def parameters_bytes(flash: Any) -> int:
    """Bytes of the model's weights, wherever they are."""
    if flash.manifest is None:
        return int(flash.plan.parameters_bytes)
    units = flash.plan.units
    # A slot may be smaller than a block, without a part that is resident (for the exact predictor).
    return flash.plan.demand.resident + units.layers * units.per_layer * flash.manifest.layout.block_bytes
