"""The app's settings, stored as JSON in the system's folder for settings."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

RECENT_MODELS = 8
DEMO = ""  # stands for the demo model where a string is needed


@dataclass(frozen=True)
class AppSettings:
    model: str | None = None  # a folder or a Hugging Face id; None: the demo model
    recent: tuple[str, ...] = ()  # recent models, latest first
    memory: dict[str, int] = field(default_factory=dict)  # model -> budget in bytes; automatic if it is missing
    unfinished: tuple[str, ...] = ()  # models whose downloads were begun and not finished

    @property
    def budget(self) -> int | None:
        """The budget of the chosen model in bytes; None: automatic."""
        return self.memory.get(self.model or DEMO)

    def with_model(self, model: str | None) -> AppSettings:
        recent = self.recent if model is None else (model, *(name for name in self.recent if name != model))
        return replace(self, model=model, recent=recent[:RECENT_MODELS])

    def with_recent(self, model: str) -> AppSettings:
        """The model is in the list, without being chosen."""
        return replace(self.with_model(model), model=self.model)

    def with_budget(self, budget: int | None) -> AppSettings:
        others = {name: size for name, size in self.memory.items() if name != (self.model or DEMO)}
        return replace(self, memory=others if budget is None else {**others, self.model or DEMO: budget})


def settings_file() -> Path:
    from platformdirs import user_config_path

    return user_config_path("mlx_flash", appauthor=False) / "menubar.json"


def read_settings(file: Path) -> AppSettings:
    """Reads the settings. Values that are damaged or have the wrong type count as missing."""
    try:
        found: Any = json.loads(file.read_bytes())
    except (OSError, ValueError):
        found = None
    found = found if isinstance(found, dict) else {}
    model, memory = found.get("model"), found.get("memory")
    return AppSettings(
        model if isinstance(model, str) and model else None,
        _names(found.get("recent"))[:RECENT_MODELS],
        {name: size for name, size in memory.items() if type(size) is int and size > 0}
        if isinstance(memory, dict)
        else {},
        _names(found.get("unfinished")),
    )


def _names(found: Any) -> tuple[str, ...]:
    return tuple(name for name in found if isinstance(name, str)) if isinstance(found, list) else ()


def write_settings(file: Path, settings: AppSettings) -> None:
    """Writes to another file first, so that a crash leaves the old settings. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(asdict(settings), indent=1) + "\n")
    partial.replace(file)
