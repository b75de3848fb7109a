"""The memory matrix: its models can be made, and it tries every budget once."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from mlx_flash.bench import memory_models, peak_memory
from mlx_flash.errors import FlashError
from mlx_flash.flash.files import read_manifest
from mlx_flash.loading import load

SMALL: dict[str, Any] = {
    "vocab_size": 5000,
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_experts": 8,
}


@pytest.mark.parametrize("name", ["opt-4bit", "relu-llama-bf16"])
def test_stores_can_be_made(name: str, tmp_path: Path) -> None:
    config, dtype, bits = memory_models.STORES[name]
    small = {
        key: value for key, value in {**SMALL, "ffn_dim": 256, "word_embed_proj_dim": 128}.items() if key in config
    }
    memory_models.write_random_store(tmp_path, {**config, **small, "num_hidden_layers": 1}, dtype, bits)
    assert read_manifest(tmp_path).layout.bits == bits
    model, _ = load.load(tmp_path, context=32)
    model.flash.close()


@pytest.mark.parametrize("name", ["olmoe-bf16", "deepseek-v2-4bit"])
def test_mixtures_can_be_made(name: str, tmp_path: Path) -> None:
    changes, quantisation, dtype = memory_models.MIXTURES[name]
    config = {**memory_models.COMMON, **changes}
    small = {**SMALL, "n_routed_experts": 8, "num_local_experts": 8, "kv_lora_rank": 64, "qk_nope_head_dim": 32}
    config |= {key: value for key, value in small.items() if key in config}
    memory_models.write_random_mixture(tmp_path, config, dtype, quantisation)
    model, _ = load.load(tmp_path, context=32)
    assert model.flash.plan.units.per_layer == 8
    model.flash.close()


def arguments(models: list[Path], **options: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    peak_memory.add_arguments(parser)
    given = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return parser.parse_args(["--model", *map(str, models), *given])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "is_store", lambda folder: "store" in folder.name)
    budgets = {"smallest": 400 * 10**6, "half": 800 * 10**6, "all": 1300 * 10**6}
    monkeypatch.setattr(peak_memory.subprocess_json, "ask", lambda *_: dict(budgets))


@pytest.mark.usefixtures("asked")
def test_no_budget_is_tried_twice() -> None:
    cells = list(peak_memory._cells(arguments([Path("mixture")], least="1GB"), []))
    assert [(name, budget) for _, _, name, budget in cells] == [
        ("smallest", 10**9),
        ("+25%", 1250 * 10**6),
        ("all", 1300 * 10**6),
    ]
    known = [{"model": "mixture", "predictor": "auto", "name": "smallest", "budget": 10**9}]
    assert [name for _, _, name, _ in peak_memory._cells(arguments([Path("mixture")], least="1GB"), known)] == [
        "+25%",
        "all",
    ]


@pytest.mark.usefixtures("asked")
def test_predictors_are_those_of_stores() -> None:
    cells = list(peak_memory._cells(arguments([Path("store"), Path("mixture")], predictors="exact,none"), []))
    assert {(model.name, predictor) for model, predictor, _, _ in cells} == {
        ("store", "exact"),
        ("store", "none"),
        ("mixture", "auto"),
    }
    assert len(cells) == 12


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"exit": 0, "kills": 0, "plan": 2 * 10**9, "peak": 1_900_000_000}, None),
        ({"exit": 0, "kills": 0, "plan": 2 * 10**8, "peak": 10**8}, None),  # too small to be close
        ({"exit": 0, "kills": 0, "plan": 2 * 10**9, "peak": 1_700_000_000}, "below 90%"),
        ({"exit": 0, "kills": 0, "plan": 2 * 10**9, "peak": 2 * 10**9 + 1}, "over its plan"),
        ({"exit": -9, "kills": 1}, "killed"),
    ],
)
def test_the_verdict(
    row: dict[str, Any], said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    log = tmp_path / "cells.jsonl"
    log.write_text(json.dumps({"model": "m", "predictor": "auto", "name": "all", "budget": 2 * 10**9, **row}) + "\n")
    monkeypatch.setattr(peak_memory, "_cells", lambda *_: [])
    if said is None:
        peak_memory.main(arguments([Path("m")], log=log))
    else:
        with pytest.raises(FlashError, match=said):
            peak_memory.main(arguments([Path("m")], log=log))
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["command"] == "peak-memory"
