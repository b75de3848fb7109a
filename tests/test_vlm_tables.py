"""Lookup tables in models that mlx-vlm builds, read row by row, against mlx-vlm's resident models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from test_mixture import PROMPT  # type: ignore[import-not-found]  # found beside this file
from vlm_mixtures import make_vlm_mixture  # type: ignore[import-not-found]

from mlx_flash.flash.in_place import InPlaceFiles
from mlx_flash.flash.reader import Reader
from mlx_flash.loading import lookup_tables
from mlx_flash.loading.expert_files import open_mixture
from mlx_flash.loading.lookup_tables import stream_tables
from mlx_flash.loading.resident_weights import open_files
from mlx_flash.source.zoos import MLX_VLM

pytestmark = [
    pytest.mark.vlm,
    pytest.mark.usefixtures("one_processor"),
    pytest.mark.filterwarnings("ignore"),  # other people's
]
pytest.importorskip("mlx_vlm")

CALLS = [PROMPT, [4], [9], [77, 31], [6], [12, 4, 50], [9]]


def answers(model: Any) -> list[np.ndarray]:
    cache = model.make_cache()
    return [np.array(model(mx.array([tokens]), cache=cache)) for tokens in CALLS]


@pytest.mark.parametrize(
    ("model_type", "tables"),
    [
        ("deepseek_v4", ["embed_tokens"]),
        ("qwen4_exp", ["embed_tokens", *(f"ngram_embedding.shards.{n}" for n in range(4))]),
    ],
)
def test_rows_have_the_bits_of_mlx_vlm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, tables: list[str]
) -> None:
    """A table in shards is called for the shards that a token needs, so a trial call does not reach all of them."""
    monkeypatch.setattr(lookup_tables, "LEAST_BYTES", 0)
    monkeypatch.setattr(lookup_tables, "WORTH", 0)
    folder = make_vlm_mixture(tmp_path, model_type)
    expected = answers(open_mixture(folder, zoo=MLX_VLM).model)
    for kept in (0, 2000, 1 << 20):
        mixture = open_mixture(folder, zoo=MLX_VLM)
        found = [path for table in mixture.lookup_tables for path in table.paths]
        assert len(found) == len(tables) and all(path.endswith(t) for path, t in zip(found, tables, strict=True))
        shared = InPlaceFiles(open_files(mixture.files, direct=True), Reader(4))
        try:
            stream_tables(mixture.lookup_tables, shared, kept, compared=False)
            for a, b in zip(answers(mixture.model), expected, strict=True):
                assert np.isfinite(b).all() and np.array_equal(a, b), kept
            assert shared.counters.reads > 0
        finally:
            shared.close()
