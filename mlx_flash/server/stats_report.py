"""The answer of /stats: the model, the plan, memory and speed. All sizes are in bytes."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from ..flash.system import current_memory_bytes, peak_memory_bytes
from .engine import Engine

KINDS = {"router": "experts", "every layer": "layers"}  # by the runtime's predictor


def statistics(engine: Engine) -> dict[str, Any]:
    """The answer of /stats. The model must be loaded."""
    flash, monitor = engine.model.flash, engine.monitor
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
            "parameters_bytes": _parameters_bytes(flash),
            "sampling": flash.defaults.sampling,
            "images": flash.images is not None,
        },
        "plan": {**flash.plan.as_dict(), "context": flash.plan.context},
        "memory": {
            "current_bytes": current_memory_bytes(),
            "peak_bytes": peak_memory_bytes(),
            "budget_bytes": flash.plan.budget,
        },
        "prompt_caches": asdict(engine.prompt_caches),
        "resident": {
            "slots": monitor.live.slots,
            "units": resident,
            "share": sum(resident) / (units.layers * units.per_layer),
        },
        "totals": monitor.totals,
        "last": monitor.last,
        "now": monitor.now,
        "queue": {"waiting": engine.waiting, "limit": engine.limit},
        "uptime_s": time.monotonic() - engine.started,
    }


def _parameters_bytes(flash: Any) -> int:
    """Bytes of the model's weights, wherever they are."""
    if flash.manifest is None:
        return int(flash.plan.parameters_bytes)
    units = flash.plan.units
    # A slot may be smaller than a block, without a part that is resident (for the exact predictor).
    return flash.plan.demand.resident + units.layers * units.per_layer * flash.manifest.layout.block_bytes
