"""Runs at the start of every Python process that tests start, because Python imports a module of this name.

With MLX_FLASH_TEST_DEVICE=cpu, MLX also computes on the CPU there. At each import, transformers reads its 1,700 source
files twice to list their definitions, which is half of the two seconds that a command takes to start. Here it gets the
list that the tests' own process made, in the file that MLX_FLASH_TEST_IMPORTS names. Neither library is imported here,
because `--help` would pay for it. Garbage is collected less often until mlx-lm is imported.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import pickle
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any


class Afterwards:
    """Lets other finders import the module `name` once, and changes it after it is loaded."""

    def __init__(self, name: str, change: Callable[[ModuleType], None]) -> None:
        self.name, self.change = name, change
        sys.meta_path.insert(0, self)  # type: ignore[arg-type]

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_change(module: ModuleType) -> None:
                load(module)
                self.change(module)

            spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec


def compute_on_the_cpu(mlx: Any) -> None:
    mlx.set_default_device(mlx.cpu)


def remember_the_list(import_utils: Any) -> None:
    look = import_utils.define_import_structure

    def remembered(path: Any, prefix: str | None = None) -> Any:
        known = Path(os.environ["MLX_FLASH_TEST_IMPORTS"])
        folder = os.path.dirname(path) if os.path.isfile(path) else str(path)
        if folder.endswith(os.path.join("transformers", "models")) and known.is_file():
            # Load a new copy each time, because callers change it. The pickled form is that of a call without a prefix.
            structure = pickle.loads(known.read_bytes())
            if prefix is None:
                return structure
            return {needs: {f"{prefix}.{name}": of for name, of in found.items()} for needs, found in structure.items()}
        return look(path, prefix)

    import_utils.define_import_structure = remembered


def collect_garbage_as_usual(_: ModuleType) -> None:
    gc.set_threshold(*USUAL)


if os.environ.get("MLX_FLASH_TEST_DEVICE") == "cpu":
    Afterwards("mlx.core", compute_on_the_cpu)
if "MLX_FLASH_TEST_IMPORTS" in os.environ:
    Afterwards("transformers.utils.import_utils", remember_the_list)
    # The garbage collector takes a fifth of the time of importing mlx-lm.
    USUAL = gc.get_threshold()
    gc.set_threshold(50_000, *USUAL[1:])
    Afterwards("mlx_lm.generate", collect_garbage_as_usual)
