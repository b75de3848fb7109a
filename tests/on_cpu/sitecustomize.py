"""On the path of the processes that tests start where MLX_FLASH_TEST_DEVICE=cpu: MLX computes on the CPU there as well.

Every Python imports a module of this name when it begins. MLX itself is not imported here: `--help` would pay for it.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class OnCpu:
    """Lets others find `mlx.core`, once, and sets its default device when it has been loaded."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name != "mlx.core":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_set(module: ModuleType) -> None:
                load(module)
                module.set_default_device(module.cpu)

            spec.loader.exec_module = load_and_set  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, OnCpu())  # type: ignore[arg-type]
