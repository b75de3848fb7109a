"""The rule of docs/checkpoints.md for which file and tensor of a checkpoint counts, and violations of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import make_mixture  # type: ignore[import-not-found]
from tiny import make_checkpoint, make_gated_checkpoint  # type: ignore[import-not-found]

from mlx_flash.convert.checkpoint import Checkpoint
from mlx_flash.convert.conversion import Settings, convert
from mlx_flash.convert.store_plan import StorePlan
from mlx_flash.errors import CheckpointError, UnsupportedModelError
from mlx_flash.flash.safetensors_file import read_header
from mlx_flash.loading import load
from mlx_flash.loading.in_place_model import open_in_place
from mlx_flash.loading.model_types import activation_of, family_of
from mlx_flash.source import checkpoint_files
from mlx_flash.source.checkpoint_files import files_in, weight_files, weights_in
from mlx_flash.source.checkpoint_tensors import choose, extent_of, tensors_in

QUICK = Settings(calibration_tokens=64)
APPLE_DOUBLE = bytes.fromhex("0005160700020000") + b"Mac OS X        " + bytes(4072)
INDEX = "model.safetensors.index.json"


def save(folder: Path, name: str, **values: float) -> None:
    mx.save_safetensors(str(folder / name), {tensor: mx.full((2,), float(value)) for tensor, value in values.items()})


def write_index(folder: Path, **index_map: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": index_map}))


def counted(folder: Path) -> dict[str, float]:
    """Name -> the first number of the tensor that counts, read from the place that the rule gives."""
    found = {}
    for name, (file, entry) in tensors_in(folder).items():
        with file.open("rb") as opened:
            opened.seek(entry.begin)
            found[name] = float(np.frombuffer(opened.read(4), np.float32)[0])
    return found


def tensors_of(path: Path) -> dict[str, mx.array]:
    loaded: Any = mx.load(str(path))
    mx.eval(loaded)
    return dict(loaded)


def as_converted(folder: Path) -> dict[str, mx.array]:
    """Every tensor that a store of the checkpoint is made from, by its name in the model."""
    checkpoint = Checkpoint(folder)
    family = family_of(checkpoint.config, folder)
    outline = StorePlan(checkpoint, family, activation_of(checkpoint.config, folder), QUICK)
    return {name: outline.load(name) for name in outline.original}


def assert_same(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and mx.array_equal(found[name], array).item(), name


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- the rule --------------------------------------------------------------------------------------------------

A, B, C = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model-00001-of-00003.safetensors"


@pytest.mark.parametrize(
    ("files", "index", "expected"),
    [
        ({A: {"x": 1}, B: {"y": 2}}, {"x": A, "y": B}, {"x": 1, "y": 2}),
        ({A: {"x": 1}, B: {"x": 2}}, {"x": A}, {"x": 1}),  # B is a shard of an older download
        ({A: {"x": 1, "y": 3}, B: {"x": 2, "y": 4}}, {"x": B, "y": A}, {"x": 2, "y": 3}),  # in any order
        ({A: {"x": 1}, B: {"x": 2, "y": 3}}, {"x": A, "y": B}, {"x": 1, "y": 3}),
        ({A: {"y": 1}, B: {"x": 2}}, {"x": A, "y": A, "z": B}, {"x": 2, "y": 1}),  # the index is wrong about x
        ({A: {"x": 1, "z": 5}, B: {"y": 2}}, {"x": A, "y": B}, {"x": 1, "y": 2, "z": 5}),  # the index does not list z
        ({A: {"x": 1}, "model.safetensors": {"x": 2}}, {"x": A}, {"x": 1}),
        ({"consolidated.safetensors": {"x": 1}, "model.safetensors": {"x": 2}}, None, {"x": 2}),
        ({A: {"x": 1}, "model.safetensors": {"x": 2}}, None, {"x": 2}),
        ({A: {"x": 1, "y": 1}, B: {"y": 1}}, None, {"x": 1, "y": 1}),  # the same bytes twice
        ({"b.safetensors": {"y": 1}, "a.safetensors": {"x": 2}}, None, {"x": 2, "y": 1}),
    ],
)
def test_which_tensor_counts(
    tmp_path: Path, files: dict[str, dict[str, float]], index: dict[str, str] | None, expected: dict[str, float]
) -> None:
    for name, tensors in files.items():
        save(tmp_path, name, **tensors)
        (tmp_path / f"._{name}").write_bytes(APPLE_DOUBLE)
    if index is not None:
        write_index(tmp_path, **index)
        (tmp_path / f"._{INDEX}").write_bytes(APPLE_DOUBLE)
    assert counted(tmp_path) == expected


@pytest.mark.parametrize("index", [None, {"x": C}, {}])
def test_two_tensors_of_a_name_between_which_nothing_decides(tmp_path: Path, index: dict[str, str] | None) -> None:
    save(tmp_path, A, x=1, y=0)
    save(tmp_path, B, x=2)
    if index is not None:
        save(tmp_path, C, z=1)
        write_index(tmp_path, y=A, w=B, **index)
    with pytest.raises(CheckpointError, match=f"tensor x is in {A} and, with other values, in {B}, and no index"):
        tensors_in(tmp_path)


def test_an_index_whose_shards_are_gone_beside_the_whole_model(tmp_path: Path) -> None:
    save(tmp_path, "model.safetensors", x=1)
    write_index(tmp_path, x=A)
    with pytest.raises(CheckpointError, match=rf"lacks 1 of 1 shards.* If model.safetensors .* remove {INDEX}"):
        weights_in(tmp_path)


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "../x.safetensors", "", "._x.safetensors", 3, None, ["x"]])
def test_an_index_that_names_no_shard(tmp_path: Path, shard: Any) -> None:
    save(tmp_path, A, x=1)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "._x.safetensors").write_bytes(APPLE_DOUBLE)
    write_index(tmp_path, x=shard)
    with pytest.raises(CheckpointError, match=r"is not an index of shards|lacks 1 of 1 shards"):
        weights_in(tmp_path)


FILES = ("model-1.safetensors", "model-2.safetensors", "model-3.safetensors")
NAMES = ("a", "b", "c", "d")


@given(
    held=st.dictionaries(st.sampled_from(FILES), st.sets(st.sampled_from(NAMES), min_size=1), min_size=1),
    index_map=st.dictionaries(st.sampled_from(NAMES), st.sampled_from(FILES)),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=100)
def test_the_rule_in_few_words(held: dict[str, set[str]], index_map: dict[str, str], order: Any) -> None:
    """The index decides. Without it, a tensor in one file counts; in several it is a double. Order is irrelevant."""
    shuffled = [(file, order.sample(sorted(names), len(names))) for file, names in held.items()]
    order.shuffle(shuffled)
    choice = choose(dict(shuffled), dict(order.sample(sorted(index_map.items()), len(index_map))))
    assert choice == choose({file: sorted(held[file]) for file in sorted(held)}, index_map)
    for name in NAMES:
        holders = {file for file in held if name in held[file]}
        if not holders:
            assert name not in choice.chosen
        elif index_map.get(name) in holders:
            assert choice.chosen[name] == index_map[name] and name not in choice.doubles
        else:
            assert choice.chosen[name] in holders
            assert choice.doubles.get(name) == (sorted(holders) if len(holders) > 1 else None)


NOISE = ("._model.safetensors", ".DS_Store", "Model.safetensors", "model.safetensors.tmp", "sub/model.safetensors")
PRESENT = st.sets(
    st.sampled_from(("model.safetensors", *FILES, "pytorch_model.bin", "x.safetensors", INDEX, *NOISE)), min_size=1
)


@given(present=PRESENT, shards=st.sets(st.sampled_from(FILES), min_size=1), order=st.randoms(use_true_random=False))
@settings(max_examples=100)
def test_the_files_in_few_words(present: set[str], shards: set[str], order: Any) -> None:
    def model() -> list[str] | None:
        if INDEX in present:
            return sorted(shards) if shards <= present else None
        if "model.safetensors" in present:
            return ["model.safetensors"]
        if found := sorted(present & set(FILES)):
            return found
        if "pytorch_model.bin" in present:
            return ["pytorch_model.bin"]
        return sorted(present & {"x.safetensors", "Model.safetensors"}) or None

    def answer(names: list[str]) -> list[str] | None:
        try:
            return weight_files(names, lambda _: json.dumps({"weight_map": {s: s for s in shards}}), "here").names
        except CheckpointError:
            return None

    assert answer(sorted(present)) == answer(order.sample(sorted(present), len(present))) == model()


# -- the same for every kind of model ----------------------------------------------------------------------------


def in_two_shards(folder: Path, stray: Callable[[mx.array], mx.array]) -> None:
    """Splits model.safetensors into two shards and an index. The second has changed doubles and is first in order."""
    weights = tensors_of(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    first, second = "model-2.safetensors", "model-1.safetensors"
    halves = {first: names[::2], second: names[1::2]}
    mx.save_safetensors(str(folder / first), {name: weights[name] for name in halves[first]})
    doubles = {name: stray(weights[name]) for name in names[::2]}
    mx.save_safetensors(str(folder / second), {name: weights[name] for name in halves[second]} | doubles)
    mx.save_safetensors(str(folder / "model-0.safetensors"), {name: stray(w) for name, w in weights.items()})
    (folder / INDEX).write_text(json.dumps({"weight_map": {n: file for file in halves for n in halves[file]}}))


def test_a_store_is_made_of_what_the_index_names(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", neurons=128)
    expected = as_converted(folder)
    in_two_shards(folder, lambda array: array + 1)
    assert_same(as_converted(folder), expected)


def test_torch_files_follow_the_same_rule(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    folder = make_checkpoint(tmp_path / "checkpoint", neurons=128)
    expected = as_converted(folder)
    weights = {name: torch.from_numpy(np.array(w)) for name, w in tensors_of(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    wrong = {name: weights[name] + 1 for name in names[::2]}
    torch.save({name: weights[name] for name in names[::2]}, folder / "pytorch_model-2.bin")
    torch.save({name: weights[name] for name in names[1::2]} | wrong, folder / "pytorch_model-1.bin")
    (folder / "._pytorch_model-1.bin").write_bytes(APPLE_DOUBLE)
    with pytest.raises(CheckpointError, match=r"is in pytorch_model-1\.bin and, with other values, in"):
        as_converted(folder)
    index_map = {name: f"pytorch_model-{2 - i % 2}.bin" for i, name in enumerate(names)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index_map}))
    assert_same(as_converted(folder), expected)
    assert extent_of(folder).tensors >= len(names)
    configure(folder, num_hidden_layers=10**9)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 1000000000, and the checkpoint has \d+ tensors"):
        load.load(folder)


@pytest.mark.parametrize("rename", ["index", "other name", "apple"])
def test_a_mixture_is_made_of_what_the_rule_names(tmp_path: Path, rename: str) -> None:
    folder = make_mixture(tmp_path / "[4bit] qwen3", "qwen3_moe", "4 bits")
    expected = tensors_of(folder / "model.safetensors")
    if rename == "index":
        in_two_shards(folder, lambda array: (array + 1).astype(array.dtype))
    elif rename == "other name":
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
    else:
        for name in ("model.safetensors", "config.json", "model-0.safetensors"):
            (folder / f"._{name}").write_bytes(APPLE_DOUBLE)
    mixture = open_in_place(folder)
    resident = dict(mixture.resident())
    assert resident and all(mx.array_equal(array, expected[name]).item() for name, array in resident.items())
    for path, tensors in mixture.switches.items():
        for name, tensor in tensors.items():
            whole = expected[f"{path}.{name}"]
            for expert in (0, 11):
                file = mixture.files[tensor.file_of[expert]]
                data = file.read_bytes()[tensor.offsets[expert] :][: tensor.nbytes]
                found = mx.array(np.frombuffer(data, np.uint8)).view(whole.dtype).reshape(whole.shape[1:])
                assert mx.array_equal(found, whole[expert]).item(), (name, expert)


def test_a_mixture_in_torch_files(tmp_path: Path) -> None:
    folder = make_mixture(tmp_path / "mixture", "mixtral")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"has only PyTorch files \(pytorch_model.bin\).*Look for a checkpoint"):
        open_in_place(folder)


def test_nothing_hidden_is_copied_into_a_store_or_listed_in_it(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", neurons=128)
    write_tokenizer(folder)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / f"._{name}").write_bytes(APPLE_DOUBLE)
    manifest = convert(folder, tmp_path / "store", QUICK)
    assert not any(name.startswith(".") for name in manifest.files)
    assert not any(path.name.startswith(".") for path in (tmp_path / "store").iterdir())


# -- names and tied weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["without", "twice"])
@pytest.mark.parametrize("make", [make_checkpoint, make_gated_checkpoint])
def test_names_with_another_prefix(tmp_path: Path, make: Callable[..., Path], prefix: str) -> None:
    folder = make(tmp_path / "checkpoint", neurons=128)
    expected = as_converted(folder)
    weights = tensors_of(folder / "model.safetensors")
    change = (lambda name: name.removeprefix("model.")) if prefix == "without" else (lambda name: f"model.{name}")
    mx.save_safetensors(str(folder / "model.safetensors"), {change(name): w for name, w in weights.items()})
    assert_same(as_converted(folder), expected)


def test_two_spellings_of_one_name(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", neurons=128)
    weights = tensors_of(folder / "model.safetensors")
    name = "model.decoder.layers.0.fc1.weight"
    mx.save_safetensors(str(folder / "model.safetensors"), weights | {name.removeprefix("model."): weights[name] + 1})
    with pytest.raises(CheckpointError, match="are the same tensor of the model, but hold different numbers"):
        as_converted(folder)


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_tied_weights_under_the_other_name(tmp_path: Path, kind: str) -> None:
    if kind == "opt":
        folder, embedding = make_checkpoint(tmp_path / "checkpoint", neurons=128), "model.decoder.embed_tokens.weight"
    else:
        folder, embedding = make_gated_checkpoint(tmp_path / "checkpoint", neurons=128), "model.embed_tokens.weight"
        configure(folder, tie_word_embeddings=True)
    weights = tensors_of(folder / "model.safetensors")
    weights.pop("lm_head.weight", None)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    expected = as_converted(folder)
    only = {("lm_head.weight" if name == embedding else name): array for name, array in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), only)
    assert_same(as_converted(folder), expected)
    mx.save_safetensors(str(folder / "model.safetensors"), only | {embedding: weights[embedding] + 1})
    with pytest.raises(
        CheckpointError, match=r"config.json ties lm_head.weight to .*, but they hold different numbers"
    ):
        as_converted(folder)


# -- quantised -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 8])
def test_what_mlx_lm_quantised_is_unpacked(tmp_path: Path, bits: int) -> None:
    folder = make_gated_checkpoint(tmp_path / "checkpoint", neurons=128)
    weights = tensors_of(folder / "model.safetensors")
    packed: dict[str, mx.array] = {}
    plain: dict[str, mx.array] = {}
    for name, array in weights.items():
        group_size, own_bits = (32, 4) if name == "lm_head.weight" else (64, bits)
        if array.ndim < 2:
            packed[name] = plain[name] = array
            continue
        words, scales, biases = mx.quantize(array, group_size, own_bits)
        path = name.removesuffix(".weight")
        packed |= dict(zip((name, f"{path}.scales", f"{path}.biases"), (words, scales, biases), strict=True))
        plain[name] = mx.dequantize(words, scales, biases, group_size, own_bits)
    mx.save_safetensors(str(folder / "model.safetensors"), plain)
    expected = as_converted(folder)
    mx.save_safetensors(str(folder / "model.safetensors"), packed)
    with pytest.raises(CheckpointError, match=r"quantised by MLX .*mlx_lm.convert --dequantize"):
        as_converted(folder)
    configure(folder, quantization={"group_size": 64, "bits": bits, "lm_head": {"group_size": 32, "bits": 4}})
    assert_same(as_converted(folder), expected)
    rows = Checkpoint(folder).load("lm_head.weight", 5, 9)
    assert mx.array_equal(rows, plain["lm_head.weight"][5:9]).item()
    configure(folder, quantization={"group_size": 64, "bits": bits + 1 if bits < 8 else 6})
    with pytest.raises(CheckpointError, match=r"as config\.json says"):
        as_converted(folder)


FOREIGN = {
    "GPTQ": (("qweight", "qzeros", "scales", "g_idx"), {}),
    "AWQ, 4 bits": (("qweight", "qzeros", "scales"), {"quant_method": "awq", "bits": 4}),
    "bitsandbytes": (("weight", "weight.absmax", "weight.quant_map"), {"quant_method": "bitsandbytes"}),
    "FP8": (("weight", "weight_scale"), {}),
    "compressed-tensors": (("weight_packed", "weight_scale"), {"quant_method": "compressed-tensors"}),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("make", [make_checkpoint, lambda folder: make_mixture(folder, "qwen3_moe")])
def test_other_quantisations_are_named(tmp_path: Path, kind: str, make: Callable[[Path], Path]) -> None:
    folder = make(tmp_path / "checkpoint")
    suffixes, config = FOREIGN[kind]
    weights = tensors_of(folder / "model.safetensors")
    for name in [name for name, array in weights.items() if name.endswith(".weight") and array.ndim >= 2]:
        array = weights.pop(name)
        for suffix in suffixes:
            weights[name.removesuffix("weight") + suffix] = mx.zeros(array.shape, mx.uint8)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    if config:
        configure(folder, quantization_config=config)
    with pytest.raises(CheckpointError, match=rf"quantised \({kind}.*\).* [Uu]se (the unquantised|a) checkpoint"):
        if "opt" in (folder / "config.json").read_text():
            as_converted(folder)
        else:
            open_in_place(folder)


# -- links, sizes and what is not a file -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["notes.txt", "config.json", "model.safetensors", "tokenizer.json"])
def test_links_out_of_the_folder_are_not_followed(tmp_path: Path, name: str) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", neurons=128)
    write_tokenizer(folder)
    (folder / name).touch()
    shutil.move(folder / name, tmp_path / "secret")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=rf"{name} is a link to .*secret, which is outside the checkpoint"):
        convert(folder, tmp_path / "store", QUICK)
    with pytest.raises(CheckpointError, match="which is outside"):
        load.load(folder)
    assert not (tmp_path / "store.partial").exists()
    (tmp_path / "secret").unlink()
    with pytest.raises(CheckpointError, match="is a link that leads nowhere"):
        files_in(folder)


def test_links_that_may_be_followed(tmp_path: Path) -> None:
    """Links may lead within the folder, to the blobs of the same repository, and to the folder itself."""
    repository = tmp_path / "hub" / "models--owner--name"
    folder = make_checkpoint(repository / "snapshots" / "0123abcd", neurons=128)
    (repository / "blobs").mkdir()
    for path in list(folder.iterdir()):
        shutil.move(path, repository / "blobs" / f"etag-{path.name}")
        path.symlink_to(Path("../../blobs") / f"etag-{path.name}")
    (folder / "extra.json").symlink_to("config.json")
    (tmp_path / "link").symlink_to(folder)
    assert files_in(tmp_path / "link") == ["config.json", "extra.json", "model.safetensors"]
    assert convert(tmp_path / "link", tmp_path / "store", QUICK)
    other = tmp_path / "hub" / "models--other--name" / "blobs"
    other.mkdir(parents=True)
    (other / "secret").write_text("x")
    (folder / "x.json").symlink_to(other / "secret")
    with pytest.raises(CheckpointError, match="outside"):
        files_in(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors", INDEX]
)
@pytest.mark.parametrize("kind", ["folder", "named pipe", "large"])
@pytest.mark.parametrize("entry", ["load", "convert"])
def test_what_is_not_a_file_or_no_small_one(tmp_path: Path, name: str, kind: str, entry: str) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", neurons=128)
    (folder / name).unlink(missing_ok=True)
    if kind == "folder":
        (folder / name).mkdir()
    elif kind == "named pipe":
        os.mkfifo(folder / name)
    elif name == "model.safetensors":
        return
    else:
        with (folder / name).open("wb") as file:
            file.truncate(64 << 30)
    said = "has 68719 MB; a file of its kind has at most" if kind == "large" else f"is a {kind}; expected a file"
    with pytest.raises(CheckpointError, match=f"{name} {said}"):
        if entry == "load":
            load.load(folder)
        else:
            convert(folder, tmp_path / "store", QUICK)


def test_the_largest_small_files_of_real_models_pass() -> None:
    assert checkpoint_files.MAX_SMALL_BYTES > 40e6 and checkpoint_files.MAX_CONFIG_BYTES > 10e6


# -- headers -------------------------------------------------------------------------------------------------------

HEADERS = {
    "not UTF-8": b'{"\xff\xfe":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "UTF-16": '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.encode("utf-16-le"),
    "half a pair": b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "a wide dimension": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32",'
    b'"shape":[2147483648,0],"data_offsets":[4,4]}}',
}


def write_header(path: Path, header: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"0000")


@pytest.mark.parametrize("header", HEADERS)
def test_headers_that_mlx_reads_differently(tmp_path: Path, header: str) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", neurons=128)
    write_header(folder / "model.safetensors", HEADERS[header])
    with pytest.raises(ValueError, match=r"UTF|utf|JSON|surrogate|malformed"):
        read_header(folder / "model.safetensors")
    for entry in (Checkpoint, tensors_in, load.load):
        with pytest.raises(CheckpointError, match=r"model.safetensors is not a valid safetensors file.*again\.$"):
            entry(folder)


@pytest.mark.parametrize(
    "header",
    [
        b'{"__metadata__":{"a":3},"b":{"dtype":"F64","shape":[0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F64","shape":[],"data_offsets":[0,8]}}',
    ],
)
def test_headers_that_only_mlx_refuses(tmp_path: Path, header: bytes) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", neurons=128)
    (folder / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(8 * (b"0,8" in header))
    )
    with pytest.raises(CheckpointError, match=r"model.safetensors is not a valid safetensors file"):
        Checkpoint(folder)


def test_an_unsupported_quantisation_is_not_a_damaged_checkpoint() -> None:
    assert issubclass(UnsupportedModelError, CheckpointError)
