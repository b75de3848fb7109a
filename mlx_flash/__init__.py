"""Runs language models that are bigger than memory: feed-forward weights stay on the SSD until a token needs them.

import mlx_flash
model, tokenizer = mlx_flash.load("path/to/store", memory="6GB")
print(mlx_flash.generate(model, tokenizer, "Once upon a time"))
"""

import os
import sys


def _leave_working_directory() -> None:
    """Removes the working directory from sys.path when this package was started by `python -m mlx_flash.x`.

    Python would look there first for every module. The working directory may be a checkpoint's folder, and code from a
    checkpoint is never run. It is removed before anything else is imported. It stays if it holds this package itself,
    as in a clone that is not installed. Modules that Python imported earlier cannot be undone. The console script
    `mlxflash` does not have the working directory in its path at all.
    """
    started_by_m = sys.argv[:1] == ["-m"] and any("mlx_flash" in argument for argument in sys.orig_argv)
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if started_by_m and not sys.flags.safe_path and sys.path and sys.path[0] == os.getcwd() != here:
        del sys.path[0]


_leave_working_directory()

from types import ModuleType  # noqa: E402
from typing import Any  # noqa: E402

from .cli.beginning import end_at_once_if_told  # noqa: E402

end_at_once_if_told()

__version__ = "0.1.0"
__all__ = ["LoadOptions", "generate", "load", "plan", "stream_generate"]

_HOMES = {
    "LoadOptions": "loading.options",
    "generate": "text.generation",
    "load": "loading.load",
    "plan": "loading.load",
    "stream_generate": "text.generation",
}


class _Package(ModuleType):
    """Keeps `mlx_flash.generate` the function, even after the module of that name (a command) is imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    # Importing the runtime takes seconds (mlx-lm and transformers); `--help` must not pay for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'mlx_flash' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"mlx_flash.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
