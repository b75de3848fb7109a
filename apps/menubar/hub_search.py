"""Searches the Hugging Face Hub for models that would run: python -m mlx_flash.apps.menubar.hub_search TEXT

A separate process, because it asks the zoos which types they have. It prints one line of JSON per model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

ASKED = 200  # models of which the Hub is asked, those that are downloaded most first
SHOWN = 60
FIELDS = ["config", "downloads", "safetensors", "tags"]


def search(text: str) -> Iterator[dict[str, Any]]:
    """{"name", "size_bytes" (None if the Hub does not know it), "downloads"} of every model whose type runs.

    Raises huggingface_hub's errors.
    """
    from huggingface_hub import HfApi

    from mlx_flash.loading.model_types import family_types
    from mlx_flash.source.zoos import types_of_zoos

    listed = HfApi().list_models(search=text, sort="downloads", limit=ASKED, expand=FIELDS)
    whole, converted = types_of_zoos(), {*family_types()}
    shown = 0
    for model in listed:
        kind = (model.config or {}).get("model_type")
        size = size_of(model.safetensors)
        # Without safetensors, only what is converted runs: from PyTorch files.
        from_torch = size is None and kind in converted and "gguf" not in (model.tags or ())
        if from_torch or (kind in whole | converted and size is not None):
            yield {"name": model.id, "size_bytes": size, "downloads": model.downloads or 0}
            if (shown := shown + 1) == SHOWN:
                return


def size_of(info: Any) -> int | None:
    """Bytes of a repository's weights, from the Hub's counts of numbers by type."""
    from mlx_flash.flash.safetensors_file import DTYPE_BYTES

    counts = getattr(info, "parameters", None)
    if not isinstance(counts, dict) or not counts:
        return None
    return sum(count * DTYPE_BYTES.get(dtype, 1) for dtype, count in counts.items())


def main() -> None:
    from mlx_flash.cli import stopping
    from mlx_flash.source.hub_listing import why_unreachable

    stopping.end_with_stdin()
    try:
        for found in search(sys.argv[1]):
            print(json.dumps(found), flush=True)
    except Exception as error:  # huggingface_hub and its HTTP library raise a dozen unrelated kinds
        why, remedy = why_unreachable(error)
        sys.exit(f"{why[0].upper()}{why[1:]}. {remedy}")


if __name__ == "__main__":
    main()
