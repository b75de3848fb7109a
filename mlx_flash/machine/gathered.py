"""All that is known of this machine, in one dict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..source.cached import cache_folder
from ..source.installed import hub_cache, installed_models
from ..source.kept_trials import kept_trials
from .cache_contents import cache_contents
from .device import device, self_tests
from .disk_probe import OWN_BYTES, probe
from .environment import environment
from .hardware import hardware, versions
from .hazards import findings
from .memory_state import memory_state
from .power import power
from .told import Facts, part
from .volumes import volume

LEAST_BYTES = OWN_BYTES  # of a model's file that the disk is measured with


def gathered(model: Path | None = None, say: Callable[[str], None] = lambda _: None) -> Facts:
    """Every part by its name, and "findings": what of it is a hazard, see `findings`. It takes some ten seconds.

    model: the folder of a model; the disk that it is on is examined, else that of the Hub's cache. say: called with the
    name of what begins. Raises nothing: a part that fails says why in its "unknown".
    """
    gather: dict[str, Callable[[], Facts]] = {
        "hardware": hardware,
        "versions": versions,
        "environment": environment,
        "memory": memory_state,
        "power": power,
        "device": device,
        "tests": self_tests,
        "volume": lambda: volume(model or hub_cache()),
        "disk": lambda: probe(largest_file(model), cache_folder()),
        "cache": cache_contents,
        "trials": lambda: {"models": kept_trials(), "unknown": {}},
    }
    facts: dict[str, Any] = {}
    for name, ask in gather.items():
        say(name)
        facts[name] = part(ask)
    return {**facts, "findings": findings(facts)}


def largest_file(model: Path | None) -> Path | None:
    """The largest file of the model, or else of all models on this machine; None if none is large enough."""
    folders = [each.folder for each in installed_models()] if model is None else [model]
    files = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size, default=None)
    return largest if largest is not None and largest.stat().st_size >= LEAST_BYTES else None
