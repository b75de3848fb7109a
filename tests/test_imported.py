"""Predictors in PowerInfer's files choose the same neurons here as in PowerInfer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_checkpoint  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.check import check_store
from mlx_flash.convert import __main__ as command
from mlx_flash.convert import imported
from mlx_flash.convert.conversion import Settings, convert
from mlx_flash.errors import CheckpointError, FlashError, UsageError
from mlx_flash.layers.predictors import ImportedPredictor
from mlx_flash.loading.load import load

WIDTH, NEURONS, RANK = 32, 128, 8
WHERE = Path("model_0.pt")


def matrices(rng: np.random.Generator, width: int = WIDTH, neurons: int = NEURONS) -> tuple[np.ndarray, np.ndarray]:
    """fc1 (r, D) and fc2 (F, r)."""
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((RANK, width), (neurons, RANK)))  # type: ignore[return-value]


def norm_of(kind: str, rng: np.random.Generator) -> nn.Module | None:
    if kind == "none":
        return None
    norm = nn.RMSNorm(WIDTH) if kind == "rms" else nn.LayerNorm(WIDTH)
    norm.weight = mx.array(rng.uniform(0.2, 3, WIDTH).astype(np.float32) * rng.choice([-1, 1], WIDTH))
    if kind == "layer":
        norm.bias = mx.array(rng.standard_normal(WIDTH).astype(np.float32))
    return norm


@pytest.mark.parametrize("kind", ["rms", "layer", "none"])
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(0.01, 100))
def test_the_same_choice_as_powerinfer_s(kind: str, seed: int, size: float) -> None:
    """PowerInfer's rule at a threshold of 0 is relu(p fc1^T) fc2^T > 0. p is the input of the norm before the FFN."""
    rng = np.random.default_rng(seed)
    p = rng.standard_normal((4, WIDTH)) * size
    if kind == "layer":
        p -= p.mean(axis=1, keepdims=True)  # the norm subtracts the mean, so it cannot be recovered afterwards
    first, second = matrices(rng)
    norm = norm_of(kind, rng)
    theirs = np.maximum(p @ first.T, 0) @ second.T
    x = mx.array(p.astype(np.float32))
    if norm is not None:
        norm.eps = 1e-12
        x = norm(x)
    arrays = imported.map_layer((first, second), norm, NEURONS, WIDTH, WHERE)
    predictor = ImportedPredictor(**{name: mx.array(arrays[name]) for name in "ahb"}, c=mx.zeros((NEURONS,)))
    mask, activations = predictor(x)
    clear = np.abs(theirs) > 1e-3 * np.abs(theirs).max()
    assert activations is None
    assert (np.array(mask) == (theirs > 0))[clear].all()


def test_what_does_not_fit() -> None:
    rng = np.random.default_rng(0)
    first, second = matrices(rng)
    for pair in ((first.T, second), (first, second.T), (first[:, 1:], second), (first[:0], second[:, :0])):
        with pytest.raises(CheckpointError, match=r"expected \(r, 32\) and \(128, r\)"):
            imported.map_layer(pair, None, NEURONS, WIDTH, WHERE)
    with pytest.raises(CheckpointError, match="not finite"):
        imported.map_layer((first, second * np.float32("nan")), None, NEURONS, WIDTH, WHERE)
    norm = nn.RMSNorm(WIDTH)
    norm.weight = mx.concatenate([mx.zeros((1,)), mx.ones((WIDTH - 1,))])
    with pytest.raises(CheckpointError, match="erases inputs"):
        imported.map_layer((first, second), norm, NEURONS, WIDTH, WHERE)


# -- files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("imported") / "checkpoint", hidden=WIDTH, neurons=NEURONS)
    return folder


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "predictors"
    folder.mkdir()
    for layer in range(2):
        (folder / f"model_{layer}.pt").write_bytes(b"not read")
    (folder / "config.json").write_text("{}")
    return folder


def test_a_file_for_each_layer_and_no_more(files: Path) -> None:
    assert imported.find_files(files, 2) == [files / "model_0.pt", files / "model_1.pt"]
    with pytest.raises(UsageError, match=r"lacks predictors of 2 of 4 layers, the first is model_2.pt"):
        imported.find_files(files, 4)
    with pytest.raises(UsageError, match=r"has model_1.pt, but the model has 1 layers"):
        imported.find_files(files, 1)


def test_neither_a_folder_nor_a_repository(files: Path) -> None:
    assert imported.find_predictors(str(files)) == files
    for source in (str(files / "model_0.pt"), "nowhere", "../a/b", "a/b/c", ""):
        with pytest.raises(UsageError, match="neither a folder nor a Hugging Face repository id"):
            imported.find_predictors(source)


def test_without_torch(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"reading it needs torch: `pip install 'mlx-flash-runtime\[convert\]'`"):
        imported.read_file(files / "model_0.pt")


def perfect(checkpoint: Path) -> Callable[[Path], tuple[np.ndarray, np.ndarray]]:
    """Predictors in that form that know the up projection. From the residual p they see fc1 (p w) and its negative."""
    weights: Any = mx.load(str(checkpoint / "model.safetensors"))

    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        layer = path.stem.removeprefix("model_")
        prefix = f"model.decoder.layers.{layer}."
        up = np.array(weights[prefix + "fc1.weight"]) * np.array(weights[prefix + "final_layer_norm.weight"])
        eye = np.eye(NEURONS, dtype=np.float32)
        return np.concatenate([up, -up]), np.concatenate([eye, -eye], axis=1)

    return read


def test_a_store_with_imported_predictors(
    checkpoint: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_model: Callable[..., Any]
) -> None:
    monkeypatch.setattr(imported, "check_files", lambda *_: None)
    monkeypatch.setattr(imported, "read_file", perfect(checkpoint))
    settings = Settings(calibration_tokens=1024, predictor_from=files)
    manifest = convert(checkpoint, tmp_path / "store", settings)
    report = manifest.predictors["imported"]
    assert manifest.default_predictor == "imported" and list(manifest.predictors) == ["lowrank", "shadow", "imported"]
    assert report["rank"] == [2 * NEURONS] * 2
    assert np.mean(report["recall"]) == pytest.approx(0.99, abs=0.02)
    # The predictor only lacks the biases of the up projection and the residual's mean.
    assert np.mean(report["predicted"]) < 1.5 * np.mean(report["active"])
    assert check_store(tmp_path / "store") == []
    lower = open_model(tmp_path / "store", recall=0.9).layers[0].mlp.predictor
    usual = open_model(tmp_path / "store").layers[0].mlp.predictor
    x = mx.random.normal((32, WIDTH), key=mx.random.key(0))
    assert isinstance(usual, ImportedPredictor)
    assert lower(x)[0].sum().item() < usual(x)[0].sum().item()
    (files / "model_1.pt").unlink()
    with pytest.raises(UsageError, match=r"the first is model_1.pt"):
        convert(checkpoint, tmp_path / "other", settings)
    assert not (tmp_path / "other").exists()


def gated_checkpoint(folder: Path) -> Path:
    """Llama with ReLU, for which PowerInfer has published predictors: an RMS norm before a gated FFN."""
    rng = np.random.default_rng(2)
    config = {"model_type": "llama", "hidden_act": "relu", "hidden_size": WIDTH, "intermediate_size": NEURONS}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 96}
    config |= {"rms_norm_eps": 1e-6, "max_position_embeddings": 64, "tie_word_embeddings": False}
    shapes = {"model.embed_tokens.weight": (96, WIDTH), "lm_head.weight": (96, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (NEURONS, WIDTH) for name in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (WIDTH, NEURONS)}
        shapes |= {f"{prefix}{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    weights = {name: rng.standard_normal(shape) / np.sqrt(shape[-1]) for name, shape in shapes.items()}
    weights |= {name: rng.uniform(0.5, 2, shape) for name, shape in shapes.items() if "norm" in name}
    folder.mkdir()
    arrays = {name: mx.array(weight.astype(np.float32)) for name, weight in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_gated_model(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate decides. An RMS norm loses no information, so a predictor that knows the gate makes no mistakes."""
    checkpoint = gated_checkpoint(tmp_path / "checkpoint")
    weights: Any = mx.load(str(checkpoint / "model.safetensors"))

    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        prefix = f"model.layers.{path.stem.removeprefix('model_')}."
        gate = np.array(weights[prefix + "mlp.gate_proj.weight"])
        gate = gate * np.array(weights[prefix + "post_attention_layernorm.weight"])
        eye = np.eye(NEURONS, dtype=np.float32)
        return np.concatenate([gate, -gate]), np.concatenate([eye, -eye], axis=1)

    monkeypatch.setattr(imported, "check_files", lambda *_: None)
    monkeypatch.setattr(imported, "read_file", read)
    settings = Settings(calibration_tokens=1024, predictor_from=files, recall=0.999)
    report = convert(checkpoint, tmp_path / "store", settings).predictors["imported"]
    assert np.mean(report["recall"]) == pytest.approx(0.999, abs=2e-3)
    assert np.mean(report["predicted"]) <= 1.002 * np.mean(report["active"])
    assert report["perplexity"]["predicted"] == pytest.approx(report["perplexity"]["dense"], rel=1e-3)


def test_predictors_that_catch_nothing_are_no_default(
    checkpoint: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = perfect(checkpoint)
    monkeypatch.setattr(imported, "check_files", lambda *_: None)
    monkeypatch.setattr(imported, "read_file", lambda path: tuple(matrix * 0 for matrix in read(path)))
    with pytest.raises(CheckpointError, match=r"model_0\.pt finds 0\.0% of the active neurons"):
        convert(checkpoint, tmp_path / "store", Settings(calibration_tokens=1024, predictor_from=files))


def test_other_files_begin_anew(
    checkpoint: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An interrupted conversion does not continue with the predictors of other files."""
    settings = Settings(calibration_tokens=64, predictor_from=files)

    def fail(_: Path) -> Any:
        raise CheckpointError("stopped here")

    monkeypatch.setattr(imported, "check_files", lambda *_: None)
    monkeypatch.setattr(imported, "read_file", fail)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="stopped here"):
            convert(checkpoint, tmp_path / "store", settings)
    assert "continuing the conversion" in capsys.readouterr().err
    (files / "model_0.pt").write_bytes(b"another")
    monkeypatch.setattr(imported, "read_file", perfect(checkpoint))
    convert(checkpoint, tmp_path / "store", settings)
    assert "belongs to another input" in capsys.readouterr().err
    plain = replace(settings, predictor_from=None)
    assert convert(checkpoint, tmp_path / "plain", plain).default_predictor == "shadow"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_files_written_by_torch(checkpoint: Path, tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    pairs = [matrices(rng) for _ in range(2)]
    for layer, pair in enumerate(pairs):
        named = zip(imported.TENSORS, pair, strict=True)
        tensors = {name: torch.from_numpy(matrix).to(getattr(torch, dtype)) for name, matrix in named}
        torch.save(tensors, tmp_path / f"model_{layer}.pt")
    first, second = imported.read_file(tmp_path / "model_1.pt")
    assert first.dtype == second.dtype == np.float32
    tolerance = {"float32": 0, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
    assert np.allclose(first, pairs[1][0], rtol=tolerance, atol=0)
    assert np.allclose(second, pairs[1][1], rtol=tolerance, atol=0)
    arguments = ["--model", str(checkpoint), "--output", str(tmp_path / "store"), "--predictor-from", str(tmp_path)]
    command.main(command.make_parser().parse_args([*arguments, "--calibration-tokens", "256"]))
    with pytest.raises(FlashError, match="no tokenizer"):  # this checkpoint has no tokenizer
        load(tmp_path / "store")
    assert mlx_flash.flash.files.read_manifest(tmp_path / "store").default_predictor == "imported"
    torch.save({name: torch.ones(3, 3) for name in imported.TENSORS}, tmp_path / "model_1.pt")
    with pytest.raises(CheckpointError, match=r"model_1.pt has fc1.weight \(3, 3\) and .* expected \(r, 32\)"):
        convert(checkpoint, tmp_path / "other", Settings(predictor_from=tmp_path))
    assert not (tmp_path / "other").exists() and not (tmp_path / "other.partial").exists()
    torch.save([1], tmp_path / "model_1.pt")
    with pytest.raises(
        CheckpointError, match=r"model_1.pt holds list; expected only the tensors fc1.weight and fc2.weight"
    ):
        imported.read_file(tmp_path / "model_1.pt")
    torch.save({"fc1.weight": torch.ones(1), "fc1.bias": torch.ones(1)}, tmp_path / "model_1.pt")
    with pytest.raises(CheckpointError, match=r"holds fc1.bias, fc1.weight; expected"):
        imported.read_file(tmp_path / "model_1.pt")
    (tmp_path / "model_1.pt").write_bytes(b"PK damaged")
    with pytest.raises(CheckpointError, match="cannot be read by torch"):
        imported.read_file(tmp_path / "model_1.pt")
