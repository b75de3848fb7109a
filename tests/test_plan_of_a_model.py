"""`mlx_flash.plan` and `mlxflash plan` give the plan of `load`, and nothing is read, converted or downloaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from conftest import Tiny, write_tokenizer  # type: ignore[import-not-found]  # found beside this file
from mixtures import make_mixture  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.errors import BudgetError, ConversionError, UsageError
from mlx_flash.loading import dense, in_place_loading
from mlx_flash.loading.load import load, plan
from mlx_flash.loading.options import LoadOptions
from mlx_flash.loading.plan import ENDLESS, Plan
from mlx_flash.loading.runtime import BUFFER_CACHE

pytestmark = pytest.mark.usefixtures("one_processor")


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(dense, "build", read)
    monkeypatch.setattr(in_place_loading, "read_resident", read)
    yield
    monkeypatch.undo()


def same(made: Plan, loaded: Plan) -> None:
    """Compares two plans. The process may have grown between them, and an unused part of the budget is not shown."""
    assert (made.demand.resident, made.demand.predictors) == (loaded.demand.resident, loaded.demand.predictors)
    assert (made.demand.kv_cache, made.context) == (loaded.demand.kv_cache, loaded.context)
    assert (made.units, made.slots, made.slot_bytes) == (loaded.units, loaded.slots, loaded.slot_bytes)


@pytest.mark.parametrize("predictor", ["auto", "none", "exact"])
def test_a_store(store: Path, nothing_is_read: None, request: pytest.FixtureRequest, predictor: str) -> None:
    options = LoadOptions(memory=ENDLESS, predictor=predictor, context=64)
    made = plan(store, options)
    request.getfixturevalue("monkeypatch").undo()
    model, _ = load(store, options)
    same(made, model.flash.plan)
    model.flash.close()
    assert made.smallest <= made.bytes_for(0.5) <= made.everything and made.bytes_for(1) == made.everything
    assert plan(store, memory=made.smallest, predictor=predictor, context=64).total <= made.smallest
    with pytest.raises(BudgetError) as refused:
        plan(store, memory=1, predictor=predictor, context=64)
    assert abs(refused.value.smallest_bytes - made.smallest) < 50 * 10**6  # the process may have grown


def test_a_mixture(tmp_path: Path, nothing_is_read: None, request: pytest.FixtureRequest) -> None:
    folder = make_mixture(tmp_path / "mixture", "qwen3_moe")
    write_tokenizer(folder)
    made = plan(folder, memory=ENDLESS, context=64)
    request.getfixturevalue("monkeypatch").undo()
    model, _ = load(folder, memory=ENDLESS, context=64)
    same(made, model.flash.plan)
    model.flash.close()


def test_a_checkpoint_that_was_not_converted(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=r"was not converted yet.*mlxflash convert"):
        plan(tiny.checkpoint)
    assert not (tmp_path / "cache").exists()


def test_options_or_fields() -> None:
    with pytest.raises(TypeError, match="either"):
        load(None, LoadOptions(), context=64)
    with pytest.raises(TypeError, match="expected either a LoadOptions"):
        load(None, "6GB")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="memry"):
        load(None, memry="6GB")
    wrong: tuple[dict[str, Any], ...] = (
        *(
            {"window": 0},
            {"window": 1.5},
            {"threads": 0},
            {"threads": "4"},
            {"context": 0},
            {"context": "many"},
            {"context": 2.5},
            {"context": True},
        ),
        *({"io": "x"}, {"predictor": "x"}, {"memory": "much"}, {"memory": 6.0}, {"memory": True}, {"verify": "x"}),
        *({"recall": "x"}, {"io": []}),
    )
    for fields in wrong:
        with pytest.raises(UsageError, match=f"{next(iter(fields))} is "):
            plan(None, **fields)


def test_nothing_stays_changed(store: Path) -> None:
    """Otherwise MLX would keep fewer buffers from now on, because no model is closed to restore its limit."""
    opened = BUFFER_CACHE._models
    plan(store, context=64)
    with pytest.raises(BudgetError):
        plan(store, context=64, memory=1)
    assert BUFFER_CACHE._models == opened


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("the Hub was asked"))
    with pytest.raises(ConversionError, match="was not downloaded before, and this command downloads nothing"):
        plan("nobody/has-this-model")


def test_no_sums_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    folder = make_mixture(tmp_path / "mixture", "qwen3_moe")
    write_tokenizer(folder)
    assert plan(folder, context=64, verify=True).units.per_layer == 12
    assert not (tmp_path / "cache").exists()


def test_the_command(store: Path) -> None:
    command = [sys.executable, "-c", "from mlx_flash.cli.main import main; main()", "plan", "--model", str(store)]
    done = subprocess.run([*command, "--context", "64"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("memory plan\n"), done.stderr
    table = done.stdout.partition("budgets, each with 4 MiB to spare\n")[2].splitlines()
    assert table[0].split() == ["--memory", "in", "memory", "context"], "a store has no forecast"
    assert table[1].endswith("the smallest") and table[-1].endswith("this plan")
    assert "everything" in table[-1]
    done = subprocess.run([*command, "--json", "--memory", "2GB"], capture_output=True, text=True)
    printed = json.loads(done.stdout)
    assert list(printed["budgets"]) == ["smallest", "25%", "50%", "100%"] and printed["budget"] <= 2 * 10**9
    assert [choice["budget"] for choice in printed["choices"]] == sorted(c["budget"] for c in printed["choices"])
    assert printed["choices"][0]["name"] == "smallest" and printed["choices"][0]["forecast"] is None
    done = subprocess.run([*command, "--memory", "1MB"], capture_output=True, text=True)
    assert done.returncode == 2 and "needs at least" in done.stderr and "Traceback" not in done.stderr


def test_functions_stay_where_modules_have_their_names() -> None:
    import importlib

    assert isinstance(mlx_flash.generate, FunctionType)
    assert importlib.import_module("mlx_flash.generate").main
    assert isinstance(mlx_flash.generate, FunctionType) and isinstance(mlx_flash.plan, FunctionType)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mlx_flash.plan")
