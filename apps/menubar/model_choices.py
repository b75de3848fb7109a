"""The models that the menu offers: those of the settings, and those in the server's answer of /library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlx_flash.errors import UsageError

from .settings import AppSettings

HASH_DIGITS = "[0-9a-f]" * 12  # at the end of a store's folder in the cache folder


def choices(settings: AppSettings, library: dict[str, Any] | None) -> list[str | None]:
    """The values of --model that can be chosen; None for the demo model. The first ones are those of the settings."""
    served = (model_of(entry) for entry in _entries(library) if entry.get("runs"))
    known = [None, *settings.recent, *(model for model in served if model is not None)]
    return list(dict.fromkeys(known))


def name_of(model: str | None, library: dict[str, Any] | None, started: str | None, own_name: str) -> str | None:
    """The name of a model for the server; None if it does not have it.

    model: a value of --model. started: the value that the server was started with. own_name: its name for that model.
    """
    if model == started and own_name:
        return own_name
    for entry in _entries(library):
        if model == model_of(entry) and (model is not None or entry.get("source") == "demo"):
            return str(entry["name"])
    return None


def loaded_name(library: dict[str, Any] | None) -> str:
    return next((str(entry["name"]) for entry in _entries(library) if entry.get("loaded")), "")


def model_of(entry: dict[str, Any]) -> str | None:
    """The value of --model for a model in the answer of /library; None if there is none, as for the demo model."""
    name = str(entry.get("name"))
    if entry.get("source") == "hub" and "@" not in name:  # Behind @ is the commit of one of several snapshots.
        return name
    return _store_named(name) if entry.get("source") == "cache" else None


def _store_named(name: str) -> str | None:
    """The newest store of this name in the cache folder."""
    from mlx_flash.source.resolve import cache_folder

    try:
        folder = cache_folder()
        found = [path for path in (folder / name, *folder.glob(f"{name}-{HASH_DIGITS}")) if path.is_dir()]
        return str(max(found, key=lambda path: path.stat().st_mtime)) if found else None
    except (OSError, UsageError, ValueError, NotImplementedError):  # a name that is not a pattern
        return None


def _entries(library: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    yield from (library or {}).get("models") or ()
