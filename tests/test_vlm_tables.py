"""Lookup tables in models that mlx-vlm builds, read row by row, against mlx-vlm's resident models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]  # found beside this file
from mixtures import random_like  # type: ignore[import-not-found]
from mlx.utils import tree_flatten
from test_mixture import PROMPT  # type: ignore[import-not-found]
from vlm_mixtures import make_vlm_mixture  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.flash.in_place import InPlaceFiles
from mlx_flash.flash.reader import Reader
from mlx_flash.loading import lookup_tables
from mlx_flash.loading.in_place_model import open_in_place
from mlx_flash.loading.lookup_tables import stream_tables
from mlx_flash.loading.resident_weights import open_files
from mlx_flash.source.zoos import MLX_VLM, random_mlx_vlm_model, zoo_of

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
    expected = answers(open_in_place(folder, zoo=MLX_VLM).model)
    for kept in (0, 2000, 1 << 20):
        mixture = open_in_place(folder, zoo=MLX_VLM)
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


HASHED = {
    "model_type": "deepseek_v41",
    "vocab_size": 96,
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 32,
    "o_lora_rank": 32,
    "o_groups": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "sliding_window": 8,
    "compress_ratios": [0, 0, 2, 1],
    "kv_source_layer_ids": [2],
    "index_source_layer_ids": [2],
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 4,
    "candidate_source_layer_id": 2,
    "candidate_topk_blocks": 4,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 3,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "engram_layer_ids": [1],
    "engram_num_embeddings": [53 + 59 + 61 + 67],  # the first primes from 50 on
    "engram_max_ngram_size": 3,
    "engram_vocab_size": 50,
    "engram_n_heads": 2,
    "engram_head_dim": 32,
    "engram_pad_token_id": 2,
    "engram_compressed_vocab_size": 90,
}


@pytest.mark.parametrize("quantised", [False, True])
def test_a_hashed_table_in_a_layer_has_the_bits_of_mlx_vlm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantised: bool
) -> None:
    """mlx-lm refuses this type's table. mlx-vlm's own class for it is not an Embedding, and evaluates what it reads."""
    from mlx_vlm.models.cache import make_prompt_cache
    from mlx_vlm.utils import load_model

    assert zoo_of(HASHED) == MLX_VLM
    mx.random.seed(3)
    model: Any = random_mlx_vlm_model(HASHED)
    parameters: Any = tree_flatten(model.parameters())
    weights = {name: random_like(name, array) for name, array in parameters}
    table = "language_model.layers.1.engram.embed"
    if quantised:
        weights |= zip(
            (f"{table}.{part}" for part in ("weight", "scales", "biases")),
            mx.quantize(weights[f"{table}.weight"], 32, 4),
            strict=True,
        )
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    (tmp_path / "config.json").write_text(json.dumps(HASHED))
    (tmp_path / "engram_token_map.json").write_text(json.dumps([token % 90 for token in range(96)]))
    write_tokenizer(tmp_path)
    own = load_model(tmp_path)
    own.model_path = str(tmp_path)
    cache = make_prompt_cache(own.language_model)
    expected = [np.array(own.language_model(mx.array([tokens]), cache=cache).logits) for tokens in CALLS]

    monkeypatch.setattr(lookup_tables, "LEAST_BYTES", 0)
    monkeypatch.setattr(lookup_tables, "WORTH", 0)
    mixture = open_in_place(tmp_path)
    assert [path for each in mixture.lookup_tables for path in each.paths] == ["language_model.embed_tokens", table]
    shared = InPlaceFiles(open_files(mixture.files, direct=True), Reader(4))
    try:
        stream_tables(mixture.lookup_tables, shared, 2000, compared=False)
        for a, b in zip(answers(mixture.model), expected, strict=True):
            assert np.isfinite(b).all() and np.array_equal(a, b)
    finally:
        shared.close()
    loaded, tokenizer = mlx_flash.load(tmp_path, context=64)
    tokens = [response.token for response in mlx_flash.stream_generate(loaded, tokenizer, PROMPT, max_tokens=4)]
    loaded.flash.close()
    assert tokens and loaded.flash.plan.rows_saved
