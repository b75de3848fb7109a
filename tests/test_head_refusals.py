"""A draft head that cannot be used is refused before anything is loaded. None of this needs mlx-vlm."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]  # found beside this file
from mixtures import make_mixture  # type: ignore[import-not-found]

from mlx_flash.errors import CheckpointError, UnsupportedModelError, UsageError
from mlx_flash.loading import load as loading
from mlx_flash.loading import own_head

WORKS = r"Use --draft ngram, or --draft-model with a small model of the same vocabulary\."


def checkpoint(folder: Path, tensors: list[str], **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen4_exp", **config}))
    mx.save_safetensors(str(folder / "model.safetensors"), {name: mx.zeros((2, 2)) for name in tensors})
    return folder


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_plan", lambda *_: pytest.fail("it was planned"))


@pytest.mark.parametrize("function", [loading.load, loading.plan])
def test_models_without_a_head_are_refused(function: Callable[..., object], store: Path, tmp_path: Path) -> None:
    mixture = make_mixture(tmp_path / "mixture", "mixtral")
    write_tokenizer(mixture)
    for source, found in (
        (store, "is a store, which has no draft head"),
        (mixture, r"\(mixtral\) cannot draft with a head of its own: those of deepseek_v4, qwen3_5, .* can"),
        (checkpoint(tmp_path / "bare", ["model.norm.weight", "lm_head.weight"]), "none of its tensors is named mtp"),
    ):
        with pytest.raises(UsageError, match=rf"{found}.*{WORKS}"):
            function(source, memory="2GB", draft="mtp")


def test_without_mlx_vlm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(own_head, "mlx_vlm_is_installed", lambda: False)
    folder = checkpoint(tmp_path / "model", ["mtp.norm.weight"])
    with pytest.raises(UsageError, match=rf"not installed: `pip install .*vlm.*`\. {WORKS}"):
        loading.load(folder, memory="2GB", draft="mtp")


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", ["mtp.norm.weight"], model_file="model.py")
    (folder / "model.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(UnsupportedModelError, match="code from a checkpoint is never run"):
        loading.load(folder, memory="2GB", draft="mtp")


@pytest.mark.vlm
def test_a_head_that_does_not_fit_its_configuration(tmp_path: Path) -> None:
    pytest.importorskip("mlx_vlm")
    folder = checkpoint(tmp_path / "model", ["mtp.norm.weight"], text_config={"hidden_size": 64})
    with pytest.raises(CheckpointError, match=r"mlx-vlm cannot run the draft head of .* leave --draft mtp out"):
        loading.load(folder, memory="2GB", draft="mtp")


@pytest.mark.parametrize(
    "config", [{}, {"text_config": {"hidden_size": 64}}, {"hidden_size": None, "vocab_size": 8}, {"text_config": [1]}]
)
def test_a_configuration_without_sizes(tmp_path: Path, config: dict[str, object]) -> None:
    """mlx-vlm has defaults for them, which a plan cannot see."""
    planned = own_head.PlannedHead(tmp_path, None, config)
    with pytest.raises(CheckpointError, match="mlx-vlm cannot run the draft head of"):
        _ = planned._computing_bytes


def test_a_draft_model_beside_it(store: Path) -> None:
    with pytest.raises(UsageError, match="draft is 'mtp' and a draft model is given as well"):
        loading.load(store, memory="2GB", draft="mtp", draft_model=store)
