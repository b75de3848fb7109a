"""Runs language models that are bigger than memory: feed-forward weights stay on the SSD until a token needs them.

import mlx_flash
model, tokenizer = mlx_flash.load("path/to/store", memory="6GB")
print(mlx_flash.generate(model, tokenizer, "Once upon a time"))
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["generate", "load", "stream_generate"]

_HOMES = {"generate": "generation", "load": "loading", "stream_generate": "generation"}


def __getattr__(name: str) -> Any:
    # Importing the runtime takes seconds (mlx-lm and transformers); `--help` must not pay for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'mlx_flash' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"mlx_flash.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
