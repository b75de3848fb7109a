"""From a path or an id to a model: the files that are found, and the sentences of refusals."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import QUANTISED, Tiny, change_manifest, write_tokenizer  # type: ignore[import-not-found]
from mlx.utils import tree_flatten

from mlx_flash.convert.conversion import Settings, convert
from mlx_flash.errors import (
    BudgetError,
    CheckpointError,
    CorruptStoreError,
    MissingTensorError,
    ReadError,
    StoreError,
    TruncatedStoreError,
    UnsupportedModelError,
    UsageError,
)
from mlx_flash.flash.files import Manifest, read_manifest
from mlx_flash.flash.reader import BOUNCE_BYTES_PER_THREAD
from mlx_flash.loading import dense as building
from mlx_flash.loading.config import read_config
from mlx_flash.loading.load import load
from mlx_flash.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_processor")


def test_what_load_gives(store: Path) -> None:
    said: list[str] = []
    model, tokenizer = load(store, memory="2GB", say=said.append)
    runtime, manifest = model.flash, read_manifest(store)
    assert runtime.predictor == manifest.default_predictor and runtime.manifest == manifest
    assert said[0] == runtime.plan.describe()
    assert runtime.plan.budget == 2 * 10**9 and set(runtime.plan.slots) == {manifest.layout.blocks}
    assert runtime.plan.context == 64  # the model has no more positions
    assert tokenizer.eos_token_ids == {0}
    assert tokenizer.decode(tokenizer.encode("Hello you", add_special_tokens=False)) == "Hello you"
    runtime.close()
    with pytest.raises(ReadError, match="closed"):
        model(mx.array([[5]]))


def test_the_options_arrive(store: Path) -> None:
    model, _ = load(str(store), predictor="lowrank", window=3, threads=2, context=17, io="buffered")
    streamer, stream = model.flash.streamer, model.layers[1].mlp.units
    assert (streamer.reader.threads, streamer.file.direct, stream.cache.window) == (2, False, 3)
    assert (model.flash.predictor, model.flash.plan.context, stream.layer) == ("lowrank", 17, 1)
    model.flash.close()


def test_a_file_system_without_direct_reading_is_mentioned(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = building.UnitFile
    monkeypatch.setattr(building, "UnitFile", lambda path, direct: real(path, False))
    said: list[str] = []
    for io, notes in [("direct", 1), ("buffered", 0)]:
        said.clear()
        model, _ = load(store, io=io, say=said.append)
        model.flash.close()
        assert sum("does not read past the page cache" in text for text in said) == notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"predictor": "oracle"}, "predictor is 'oracle', expected one of auto, none, exact, lowrank, shadow"),
        ({"window": 0}, "window is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"threads": 257}, "threads is 257"),
        ({"context": 0}, "context is 0"),
        ({"io": "mmap"}, "io is 'mmap'"),
        ({"memory": "6"}, "memory is '6'"),
    ],
)
def test_options_are_checked_before_anything_is_opened(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load("/no/such/folder", **options)


@pytest.mark.parametrize("predictor", ["none", "exact", "lowrank", "shadow"])
def test_too_small_a_budget_is_refused_before_anything_is_allocated(
    store: Path, monkeypatch: pytest.MonkeyPatch, predictor: str
) -> None:
    def build(*_: Any) -> Any:
        raise AssertionError("the model was built")

    monkeypatch.setattr(building, "build", build)
    gc.collect()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    with pytest.raises(
        BudgetError, match=r"this model needs at least \d+MB .*; the memory budget is 10 MB\."
    ) as caught:
        load(store, memory="10MB", predictor=predictor)
    assert mx.get_peak_memory() - before < 100_000
    monkeypatch.undo()
    model, _ = load(store, memory=caught.value.smallest_bytes, predictor=predictor)
    assert model.flash.plan.total <= caught.value.smallest_bytes
    model.flash.close()


@pytest.mark.parametrize("name", ["bfloat16", "4 bits"])
def test_the_plan_counts_what_is_then_allocated(tiny_of: Callable[[str], Tiny], name: str) -> None:
    """Stores of 16 bits or fewer, widened on the CPU, allocate resident weights and predictors as planned."""
    store = tiny_of(name).store
    for predictor in ("none", "exact", "lowrank", "shadow"):
        gc.collect()
        before = mx.get_active_memory()
        model, _ = load(store, predictor=predictor)
        plan = model.flash.plan
        scratch = sum(pool.nbytes for pool in model.flash.streamer.scratch)
        allocated = mx.get_active_memory() - before
        planned = plan.demand.resident + plan.demand.predictors + plan.slots_bytes + scratch
        assert planned * 0.95 < allocated < planned * 1.02 + 150_000, predictor
        model.flash.close()
        del model


def test_the_plan_counts_unaligned_reads(store: Path) -> None:
    """Without its up rows, a block of these tiny neurons starts within a page and needs a buffer in each thread."""
    demands = {}
    for predictor, threads in [("none", 1), ("none", 9), ("exact", 1), ("exact", 9)]:
        model, _ = load(store, predictor=predictor, threads=threads)
        demands[predictor, threads] = model.flash.plan.demand.workspace
        model.flash.close()
    assert demands["none", 9] == demands["none", 1]
    assert demands["exact", 9] - demands["exact", 1] == 8 * BOUNCE_BYTES_PER_THREAD


def test_a_store_without_that_predictor(own_store: Path) -> None:
    lowrank = {"lowrank": read_manifest(own_store).predictors["lowrank"]}
    change_manifest(own_store, predictors=lowrank, default_predictor="lowrank")
    with pytest.raises(UsageError, match="has no shadow predictor; it has: none, exact, lowrank"):
        load(own_store, predictor="shadow")


# -- damaged stores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["neurons.bin", "model.safetensors", "predictor-shadow.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("how", ["short", "gone"])
def test_truncated_and_missing_files(own_store: Path, name: str, how: str) -> None:
    path = own_store / name
    if how == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(TruncatedStoreError, match=name):
        load(own_store)


def rewrite(folder: Path, name: str, change: Callable[[dict[str, mx.array]], object]) -> None:
    """Changes the tensors of a safetensors file and its size in the manifest."""
    tensors: Any = mx.load(str(folder / name))
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(folder / "new.safetensors"), tensors)
    (folder / "new.safetensors").replace(folder / name)
    change_manifest(folder)


def test_missing_and_misshapen_tensors(own_store: Path) -> None:
    name = "model.decoder.layers.1.mlp.up_bias"
    rewrite(own_store, "model.safetensors", lambda tensors: tensors.update({name: tensors[name][:-1]}))
    with pytest.raises(StoreError, match=rf"{name} has shape \(511,\), expected \(512,\)"):
        load(own_store)
    rewrite(own_store, "model.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(MissingTensorError, match=f"lacks the tensor {name}. Convert"):
        load(own_store)


@pytest.mark.parametrize(("kind", "tensor"), [("lowrank", "1.b"), ("shadow", "0.scales")])
def test_missing_tensors_of_a_predictor(own_store: Path, kind: str, tensor: str) -> None:
    rewrite(own_store, Manifest.predictor_file(kind), lambda tensors: tensors.pop(tensor))
    with pytest.raises(MissingTensorError, match=f"predictor-{kind}.safetensors lacks the tensor {tensor}. Convert"):
        load(own_store, predictor=kind)


@pytest.mark.parametrize("name", ["model.safetensors", "predictor-shadow.safetensors"])
def test_a_damaged_header(own_store: Path, name: str) -> None:
    with (own_store / name).open("r+b") as file:
        file.write(b"\xff" * 64)
    with pytest.raises(StoreError, match=f"{name} cannot be read"):
        load(own_store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "{" + text, "config.json"),
        (lambda text: text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'), "has 3 layers, .* has 2"),
        (lambda text: text.replace('"num_attention_heads": 4', '"num_attention_heads": 5'), "not a multiple"),
        (lambda text: text.replace("hidden_size", "hidden"), "config.json"),
    ],
)
def test_a_damaged_configuration(own_store: Path, change: Callable[[str], str], message: str) -> None:
    path = own_store / "config.json"
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    change_manifest(own_store)
    with pytest.raises(CorruptStoreError, match=message):
        load(own_store)


@pytest.mark.parametrize("model_type", ["gpt-17", "nothing", "", "os.path"])
def test_unknown_models(own_store: Path, model_type: str) -> None:
    path = own_store / "config.json"
    path.write_text(path.read_text().replace('"opt"', json.dumps(model_type)))
    change_manifest(own_store)
    with pytest.raises(UnsupportedModelError, match=f"no model of type '{model_type}'"):
        load(own_store)


def test_a_store_without_a_tokenizer(own_store: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (own_store / name).unlink()
    change_manifest(own_store)
    with pytest.raises(CheckpointError, match=r"has no tokenizer files \(expected one of tokenizer\.json"):
        load(own_store)


BROKEN_TOKENIZERS = [
    ("tokenizer.json", b"", "is empty, expected JSON"),
    ("tokenizer.json", b"{}", "has added_tokens null, expected a list"),
    ("tokenizer.json", b"[1]", r"holds \[1\], expected a JSON object"),
    ("tokenizer.json", b'{"added_tokens": [], "model": 5}', "has model 5, expected an object"),
    ("tokenizer.json", b'{"added_tokens": [], "model": {"type": "BPE"}}', "does not describe a tokenizer"),
    ("tokenizer_config.json", b"[]", r"holds \[\], expected a JSON object"),
    ("tokenizer_config.json", b"{", "is not valid JSON"),
    ("tokenizer_config.json", b'{"tokenizer_class": 5}', "has tokenizer_class 5, expected a text"),
    ("tokenizer_config.json", b'{"eos_token": ["x"]}', r'has eos_token \["x"\], expected a text, or an object'),
    ("tokenizer_config.json", b'{"added_tokens_decoder": 5}', "has added_tokens_decoder 5, expected an object"),
    ("tokenizer_config.json", b'{"chat_template": [5]}', r"has chat_template \[5\], expected a text"),
    ("tokenizer_config.json", b'{"chat_template_type": "x"}', 'has chat_template_type "x", expected the name'),
    ("tokenizer_config.json", b'{"tool_parser_type": "x"}', 'has tool_parser_type "x", expected the name'),
    ("special_tokens_map.json", b"5", "holds 5, expected a JSON object"),
    ("special_tokens_map.json", b'{"eos_token": 5}', "has eos_token 5, expected a text"),
    ("added_tokens.json", b'{"x": "y"}', 'has x "y", expected a token id'),
    ("added_tokens.json", b"\xff", "has the byte 0xff at 0, expected UTF-8 text"),
    ("chat_template.json", b"{}", "has chat_template null, expected a text"),
    ("chat_template.jinja", b"ab\xff", "has the byte 0xff at 2, expected UTF-8 text"),
    ("additional_chat_templates/tool_use.jinja", b"\xff", "has the byte 0xff at 0, expected UTF-8 text"),
]


@pytest.mark.parametrize(("name", "content", "fault"), BROKEN_TOKENIZERS)
def test_a_broken_tokenizer(tmp_path: Path, name: str, content: bytes, fault: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    message = rf"the tokenizer in .* cannot be loaded: {re.escape(name)} {fault}.*\. Correct it, or download it again\."
    assert re.fullmatch(message, str(caught.value)), caught.value


def test_a_tokenizer_without_a_vocabulary(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    message = r"no file has a vocabulary \(expected tokenizer\.json, .*; found tokenizer_config\.json\)\. .*again"
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tmp_path)


def test_a_tokenizer_whose_fault_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(tmp_path)
    monkeypatch.setattr("mlx_lm.utils.load_tokenizer", lambda *_, **__: vars()["nothing"])
    with pytest.raises(CheckpointError, match=r"KeyError: 'nothing'\. Download its files \(tokenizer.*\) again\."):
        load_tokenizer(tmp_path)


def test_the_stop_tokens_are_those_of_the_generation_config(own_store: Path) -> None:
    """As in mlx-lm. Chat models name the tokens that end a turn there."""
    (own_store / "generation_config.json").write_text('{"eos_token_id": [0, 7]}')
    model, tokenizer = load(own_store)
    model.flash.close()
    assert tokenizer.eos_token_ids == {0, 7}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ends", [-5, 96, 2**128, [0, 96], "</s>", True, 1.5, [[0]], {}])
def test_stop_tokens_that_the_model_cannot_make(tiny: Tiny, tmp_path: Path, name: str, ends: Any) -> None:
    folder = Path(shutil.copytree(tiny.checkpoint, tmp_path / "checkpoint"))
    values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(values | {"eos_token_id": ends}))
    message = re.escape(f"{folder / name}: eos_token_id is {ends!r}, expected a token id from 0 to 95 (vocab_size")
    with pytest.raises(CheckpointError, match=message):
        load(folder)
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "store", Settings())


@pytest.mark.parametrize("ends", [95, [95], [], None, 0])
def test_stop_tokens_beyond_the_tokenizer_s_vocabulary(own_store: Path, ends: Any) -> None:
    """Matrices are often padded, and some unused settings have -1."""
    (own_store / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "pad_token_id": -1}))
    change_manifest(own_store)
    model, tokenizer = load(own_store)
    model.flash.close()
    assert {*(ends if isinstance(ends, list) else [0 if ends is None else ends])} <= tokenizer.eos_token_ids


def test_a_stop_token_of_0_counts(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.checkpoint, tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert read_config(folder)["eos_token_id"] == 0  # mlx-lm ignores an end token of 0


def test_a_long_text_is_encoded_without_a_warning(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import tokenization_utils_base

    path = own_store / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 5}))
    warned: list[str] = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", warned.append)
    assert len(load_tokenizer(own_store).encode("a" * 50)) == 51 and not warned


def test_a_store_truncated_while_it_is_used(own_store: Path) -> None:
    model, _ = load(own_store, predictor="none")
    os.truncate(own_store / "neurons.bin", 4096)
    with pytest.raises(ReadError, match=r"was changed while it was in use .it has 4096 bytes"):
        model(mx.array([[5]]))
    model.flash.close()


# -- bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUANTISED)
def test_resident_matrices_stay_packed_where_products_with_them_are_quick(
    tiny_of: Callable[[str], Tiny], open_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As on Metal, MLX's quantised modules keep the store's type. Here the test asks for that."""
    tiny = tiny_of(name)
    tokens = mx.array([[5, 17, 80, 3, 44, 61, 9, 30, 72, 1]])
    widened = open_model(tiny.store, predictor="exact")
    monkeypatch.setattr(building, "backend_multiplies_packed", lambda: True)
    packed = open_model(tiny.store, predictor="exact")
    modules = [m for _, m in packed.named_modules() if isinstance(m, (nn.QuantizedLinear, nn.QuantizedEmbedding))]
    assert len(modules) == sum(isinstance(m, (nn.Linear, nn.Embedding)) for _, m in widened.named_modules()) > 8
    assert {m.bits for m in modules} == {tiny.manifest.resident_bits}
    assert not any(isinstance(m, (nn.Linear, nn.Embedding)) for _, m in packed.named_modules())
    found, expected, dense = (np.array(m(tokens)) for m in (packed, widened, tiny.dense))
    assert np.abs(found - dense).max() < 1e-3 and np.abs(expected - dense).max() < 1e-4

    def kept(model: Any) -> int:
        arrays: Any = tree_flatten(model.parameters())
        return sum(array.nbytes for _, array in arrays)

    assert (kept(packed), kept(widened)) == tuple(m.flash.plan.demand.resident for m in (packed, widened))
    assert kept(packed) < kept(widened) / 2
    bits = f"{tiny.manifest.resident_bits} bits"
    assert f"norms, {bits}\n" in packed.flash.plan.describe()
    assert f"norms, {bits} widened\n" in widened.flash.plan.describe()
    assert f"(100%), {tiny.manifest.layout.bits} bits\n" in packed.flash.plan.describe()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("damage", ["scales", "biases", "weight", "bits", "16"])
def test_damaged_quantised_matrices(
    tiny_of: Callable[[str], Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, packed: bool
) -> None:
    folder = Path(shutil.copytree(tiny_of("4 bits").store, tmp_path / "store"))
    monkeypatch.setattr(building, "backend_multiplies_packed", lambda: packed)
    tensors: Any = mx.load(str(folder / Manifest.resident_file))
    name = "model.decoder.layers.1.self_attn.q_proj"
    expected: type[StoreError]
    if damage in ("bits", "16"):
        bits = 8 if damage == "bits" else 16
        change_manifest(folder, resident_bits=bits, resident_group_size=64 if bits == 8 else 0)
        expected, words = CorruptStoreError, "expected|says it is not"
    elif damage == "weight":
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:, :8]
        expected, words = CorruptStoreError, f"{name}.weight has shape"
    else:
        del tensors[f"{name}.{damage}"]
        expected, words = MissingTensorError, f"lacks the tensor {name}.{damage}"
    mx.eval(tensors)
    mx.save_safetensors(str(folder / Manifest.resident_file), tensors)
    change_manifest(folder)
    with pytest.raises(expected, match=words):
        load(folder)


def test_a_checkpoint_without_a_tokenizer_is_refused_before_it_is_converted(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    checkpoint = Path(shutil.copytree(tiny.checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    with pytest.raises(CheckpointError, match=r"bare has no tokenizer files"):
        load(checkpoint)
    assert not (tmp_path / "cache").exists()
