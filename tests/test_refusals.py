"""Inputs that would give wrong text are refused. Each case was found by trying."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import change_manifest, write_tokenizer  # type: ignore[import-not-found]  # found beside this file
from tiny import make_checkpoint, make_gated_checkpoint  # type: ignore[import-not-found]

from mlx_flash.cli.run import whole_number
from mlx_flash.convert.conversion import Settings, convert
from mlx_flash.errors import CheckpointError, CorruptStoreError, UsageError
from mlx_flash.flash.files import read_manifest
from mlx_flash.text.generation import stream_generate


def change_tensor(folder: Path, name: str, change: Callable[[mx.array], mx.array]) -> None:
    path = folder / "model.safetensors"
    weights: Any = mx.load(str(path))
    mx.eval(weights)
    weights[name] = change(weights[name])
    mx.save_safetensors(str(path), weights)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = make_checkpoint(tmp_path / "checkpoint")
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("name", ["layers.1.fc2.weight", "layers.0.self_attn.k_proj.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(checkpoint: Path, tmp_path: Path, name: str, value: float) -> None:
    change_tensor(
        checkpoint, f"model.decoder.{name}", lambda w: mx.where(mx.arange(w.size).reshape(w.shape) == 7, value, w)
    )
    with pytest.raises(CheckpointError, match=f"{name} has numbers that are not finite"):
        convert(checkpoint, tmp_path / "store", Settings(calibration_tokens=64))


def test_a_type_too_narrow_for_a_weight(checkpoint: Path, tmp_path: Path) -> None:
    change_tensor(checkpoint, "model.decoder.layers.0.fc1.weight", lambda w: w * 1e6)
    with pytest.raises(CheckpointError, match=r"not finite in float16.*wider --dtype"):
        convert(checkpoint, tmp_path / "store", Settings(dtype="float16", calibration_tokens=64))


def test_mixed_types_are_stored_in_the_widest(checkpoint: Path, tmp_path: Path, capsys: Any) -> None:
    change_tensor(checkpoint, "model.decoder.layers.0.fc1.weight", lambda w: w.astype(mx.float16))
    manifest = convert(checkpoint, tmp_path / "store", Settings(calibration_tokens=64))
    assert manifest.layout.dtype == manifest.resident_dtype == "float32"
    assert "mixes float16, float32; it is stored in float32" in capsys.readouterr().err


def test_tensors_that_the_model_does_not_use_have_no_say_in_the_type(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    weights: Any = {name: weight.astype(mx.float16) for name, weight in mx.load(str(path)).items()}  # type: ignore[union-attr]
    mx.eval(weights)
    mx.save_safetensors(str(path), {**weights, "model.decoder.position_ids": mx.arange(64)})
    manifest = convert(checkpoint, tmp_path / "store", Settings(calibration_tokens=64))
    assert manifest.layout.dtype == "float16"


def test_the_root_is_no_output(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="root of the file system"):
        convert(checkpoint, Path("/"), Settings())


@pytest.mark.parametrize("ids", [[2, 96], [2, -1], [10**6]])
def test_token_ids_that_the_model_does_not_know(store: Path, open_model: Any, tokenizer: Any, ids: list[int]) -> None:
    with pytest.raises(UsageError, match="the model knows only 0 to 95"):
        stream_generate(open_model(store), tokenizer, ids, max_tokens=1)


@pytest.mark.parametrize("step", [0, -1, 513])
def test_chunks_that_the_plan_has_no_room_for(store: Path, open_model: Any, tokenizer: Any, step: int) -> None:
    with pytest.raises(UsageError, match="makes room for 1 to 512"):
        stream_generate(open_model(store), tokenizer, [5, 6], max_tokens=1, prefill_step_size=step)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_small_files_changed_without_changing_their_size(own_store: Path, name: str) -> None:
    read_manifest(own_store)
    path = own_store / name
    text = path.read_text()
    path.write_text(text[::-1])
    with pytest.raises(CorruptStoreError, match=f"{name} does not match its checksum"):
        read_manifest(own_store)


def test_a_store_written_into_between_tokens(own_store: Path, open_model: Any, tokenizer: Any) -> None:
    from mlx_flash.errors import ReadError

    model = open_model(own_store, slots=4, predictor="none")
    responses = stream_generate(model, tokenizer, [5, 6, 7], max_tokens=5)
    next(responses)
    path = own_store / "neurons.bin"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(ReadError, match=r"was changed while it was in use \(it was written to"):
        next(responses)


@pytest.mark.parametrize(
    ("text", "said"), [("x", "not a whole number"), ("0", "not between 1 and 9"), ("10", "not between")]
)
def test_whole_numbers(text: str, said: str) -> None:
    import argparse

    assert whole_number(1, 9)("9") == 9
    with pytest.raises(argparse.ArgumentTypeError, match=said):
        whole_number(1, 9)(text)


def test_the_shadow_s_bits_are_those_that_mlx_has(own_store: Path) -> None:
    predictors = json.loads((own_store / "manifest.json").read_text())["predictors"]
    predictors["shadow"]["bits"] = 7
    change_manifest(own_store, predictors=predictors)
    with pytest.raises(CorruptStoreError, match="predictor shadow has 7 bits"):
        read_manifest(own_store)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'"),
        ({"rope_scaling": {"factor": 2}}, "expected a rope_type"),
        ({"rope_parameters": []}, r"rope_parameters is \[\]"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta is 'x'"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"vocab_size": 0}, "does not describe a model: AssertionError"),
        ({"num_key_value_heads": "2"}, "does not describe a model: [^\n]*$"),
    ],
)
def test_configurations_that_describe_no_model(tmp_path: Path, found: dict[str, Any], said: str) -> None:
    folder = make_gated_checkpoint(tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text()) | found
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        convert(folder, tmp_path / "store", Settings(calibration_tokens=64))


def test_heads_that_do_not_fit_are_found_before_anything_is_written(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", num_attention_heads=-4)
    with pytest.raises(CheckpointError, match="does not describe a model"):
        convert(folder, tmp_path / "store", Settings(calibration_tokens=64))
    assert not (tmp_path / "store.partial").exists()


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_integers_are_no_weights(checkpoint: Path, tmp_path: Path, dtype: str | None) -> None:
    name = "model.decoder.layers.1.fc2.weight"
    change_tensor(checkpoint, name, lambda w: (w * 100).astype(mx.int8))
    with pytest.raises(CheckpointError, match=r"stored in int8; expected float32"):
        convert(checkpoint, tmp_path / "store", Settings(dtype=dtype, calibration_tokens=64))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_weights_that_overflow(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("fc1", "fc2"):
        change_tensor(checkpoint, f"model.decoder.layers.0.{name}.weight", lambda w: w * 1e30)
    with pytest.raises(CheckpointError, match="layer 0 gives numbers that are not finite"):
        convert(checkpoint, tmp_path / "store", Settings(calibration_tokens=64))


@pytest.mark.parametrize(
    "activation",
    [{"kind": "relu2", "threshold": 0.0}, {"kind": "relu", "threshold": 1.0}, {"kind": "relu", "threshold": True}],
)
def test_another_activation_than_the_model_s(own_store: Path, open_model: Any, activation: dict[str, Any]) -> None:
    change_manifest(own_store, activation=activation)
    with pytest.raises(CorruptStoreError, match=r"activation|FFN"):
        open_model(own_store)


def test_other_parts_than_the_model_s(tiny_of: Any, tmp_path: Path, open_model: Any) -> None:
    folder = shutil.copytree(tiny_of("gated 8 bits").store, tmp_path / "store")
    change_manifest(folder, layout=replace(read_manifest(folder).layout, parts=("up", "down")))
    with pytest.raises(CorruptStoreError, match="has an FFN"):
        open_model(folder)


@pytest.mark.parametrize("found", [{"bits": 8}, {"group_size": 32}])
def test_a_shadow_of_another_shape(own_store: Path, open_model: Any, found: dict[str, int]) -> None:
    predictors = json.loads((own_store / "manifest.json").read_text())["predictors"]
    predictors["shadow"] |= found
    change_manifest(own_store, predictors=predictors)
    with pytest.raises(CorruptStoreError, match=r"predictor-shadow.safetensors: .* has shape"):
        open_model(own_store, predictor="shadow")


def test_numbers_in_a_report_that_are_not_finite(own_store: Path) -> None:
    predictors = json.loads((own_store / "manifest.json").read_text())["predictors"]
    predictors["shadow"]["perplexity"]["tokens"] = float("inf")
    change_manifest(own_store, predictors=predictors)
    with pytest.raises(CorruptStoreError, match="perplexity of predictor shadow"):
        read_manifest(own_store)
