"""The models that the menu offers: those of the settings, and those in the server's answer of /library."""

from __future__ import annotations

from typing import Any

from .settings import AppSettings

MODEL = "model"  # added to every entry of the server's list: the value of --model that runs it


def with_values(library: dict[str, Any]) -> dict[str, Any]:
    """The answer of /library, with the value of --model of each model; None for the demo model and unknown ones.

    It reads the folders of both caches.
    """
    from mlx_flash.source.installed import installed_models, with_own_names

    known = {(each.source, each.name): each.model for each in with_own_names(installed_models(), set())}
    entries = [{**entry, MODEL: known.get((entry["source"], entry["name"]))} for entry in library.get("models") or ()]
    return {**library, "models": entries}


def choices(settings: AppSettings, library: dict[str, Any] | None) -> list[str | None]:
    """The values of --model that can be chosen; None for the demo model. The first ones are those of the settings."""
    served = [entry[MODEL] for entry in _entries(library) if entry["runs"]]
    return list(dict.fromkeys([None, *settings.recent, *served]))


def name_of(model: str | None, library: dict[str, Any] | None, started: str | None, own_name: str) -> str | None:
    """The name of a model for the server; None if it does not have it.

    model: a value of --model. started: the value that the server was started with. own_name: its name for that model.
    """
    if model == started and own_name:
        return own_name
    for entry in _entries(library):
        if model == entry[MODEL] and (model is not None or entry["source"] == "demo"):
            return str(entry["name"])
    return None


def loaded_name(library: dict[str, Any] | None) -> str:
    return next((str(entry["name"]) for entry in _entries(library) if entry["loaded"]), "")


def _entries(library: dict[str, Any] | None) -> list[dict[str, Any]]:
    return [] if library is None else library["models"]
