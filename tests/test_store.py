"""The format: the place of every byte of a store, and manifests with false values."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_flash.convert.neuron_file import bundle_layer, row_bytes, write_neurons
from mlx_flash.convert.tensors import write_safetensors
from mlx_flash.defaults import BITS
from mlx_flash.errors import (
    CorruptStoreError,
    MissingTensorError,
    NewerFormatError,
    NotAStoreError,
    OlderFormatError,
    StoreError,
    TruncatedStoreError,
)
from mlx_flash.flash import files
from mlx_flash.flash.files import (
    ALIGNMENT,
    BLOCK_ALIGNMENT,
    ITEM_BYTES,
    LAYER_ALIGNMENT,
    MANIFEST,
    Manifest,
    NeuronLayout,
    is_store,
    read_manifest,
)
from mlx_flash.flash.safetensors_file import read_header, tensor_checksums

# -- layout --------------------------------------------------------------------------------------------------


@st.composite
def layouts(draw: st.DrawFn) -> NeuronLayout:
    """The converter's layouts, sometimes with another number of neurons per block."""
    bits, group = draw(st.sampled_from(BITS)), draw(st.sampled_from(files.GROUP_SIZES))
    layout = NeuronLayout.plan(
        draw(st.sampled_from(sorted(ITEM_BYTES))),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 150)),
        draw(st.integers(1, 40) | st.integers(1, 1500) if bits == 16 else st.integers(1, 40).map(lambda n: n * group)),
        draw(st.sampled_from(files.PARTS)),
        bits,
        group,
    )
    if draw(st.booleans()):
        count = draw(st.integers(1, layout.neurons))
        block = -(-count * layout.bundle_bytes // ALIGNMENT) * ALIGNMENT
        layout = replace(layout, neurons_per_block=count, block_bytes=block, piece_neurons=count)
    return layout


def random_rows(layout: NeuronLayout, seed: int) -> tuple[mx.array, ...]:
    """One (F, D) array per part, of any bits unless they are quantised, because NaNs must be preserved."""
    rng = np.random.default_rng(seed)
    if layout.quantised:
        numbers = (rng.standard_normal((layout.neurons, layout.width), np.float32) for _ in layout.parts)
        return tuple(mx.array(matrix).astype(getattr(mx, layout.dtype)) for matrix in numbers)
    shape = (layout.neurons, layout.row_bytes)
    return tuple(mx.array(rng.integers(1, 256, shape, np.uint8)).view(getattr(mx, layout.dtype)) for _ in layout.parts)


@settings(deadline=None, max_examples=60)
@given(layouts(), st.integers(0, 2**32))
def test_every_row_lies_where_the_law_says(layout: NeuronLayout, seed: int) -> None:
    assert layout.problem() is None
    rows = random_rows(layout, seed)
    blocks = bundle_layer(layout, rows)
    assert blocks.shape == (layout.blocks, layout.block_bytes)
    flat = blocks.reshape(-1).copy()
    for part, matrix in enumerate(rows):
        expected = row_bytes(layout, matrix)
        assert expected.shape == (layout.neurons, layout.row_bytes)
        assert layout.quantised or (expected == np.array(matrix.view(mx.uint8))).all()
        for neuron in range(layout.neurons):
            block, lane = divmod(neuron, layout.neurons_per_block)
            begin = block * layout.block_bytes + (part * layout.neurons_per_block + lane) * layout.row_bytes
            assert (flat[begin : begin + layout.row_bytes] == expected[neuron]).all()
            flat[begin : begin + layout.row_bytes] = 0
    assert not flat.any(), "padding is not zero"


@settings(deadline=None)
@given(layouts())
def test_layout_arithmetic(layout: NeuronLayout) -> None:
    assert layout.block_bytes % (BLOCK_ALIGNMENT if layout.quantised else ALIGNMENT) == 0
    assert layout.layer_bytes % LAYER_ALIGNMENT == 0
    assert (layout.blocks - 1) * layout.neurons_per_block < layout.neurons <= layout.blocks * layout.neurons_per_block
    assert 0 <= layout.layer_bytes - layout.blocks * layout.block_bytes < LAYER_ALIGNMENT
    assert layout.file_bytes == layout.layers * layout.layer_bytes
    assert 1 <= layout.piece_blocks <= layout.blocks
    for first in range(len(layout.parts)):
        offset, size = layout.part_range(layout.parts[first:])
        assert offset >= 0 and offset + size <= layout.block_bytes
    if len(layout.parts) > 2:
        with pytest.raises(ValueError, match="neighbouring"):
            layout.part_range((layout.parts[0], layout.parts[2]))


def test_blocks_of_real_models_waste_little() -> None:
    for width in (768, 1024, 2048, 2560, 4096, 5120, 7168, 9216):
        layout = NeuronLayout.plan("float16", 1, 4 * width, width, ("up", "down"))
        used = layout.neurons_per_block * layout.bundle_bytes
        assert used <= layout.block_bytes <= 1.1 * used
        assert layout.piece_blocks * layout.block_bytes <= 16 << 20


def test_small_quantised_neurons_lie_without_padding_where_it_would_be_much() -> None:
    found = {}
    for width, bits, parts in ((4096, 4, 2), (4096, 4, 3), (4096, 8, 2), (2048, 4, 2), (320, 4, 2)):
        layout = NeuronLayout.plan("float16", 1, 4 * width, width, files.PARTS[parts - 2], bits)
        found[width, bits, parts] = layout.neurons_per_block, layout.block_bytes
        assert layout.problem() is None
        assert layout.piece_neurons * width * 2 * parts <= 16 << 20  # unpacked, as for the products
        assert layout.piece_blocks * layout.block_bytes % ALIGNMENT == 0 or layout.piece_blocks == layout.blocks
    assert found == {
        (4096, 4, 2): (1, 4608),
        (4096, 4, 3): (1, 8192),
        (4096, 8, 2): (1, 8704),
        (2048, 4, 2): (1, 2304),
        (320, 4, 2): (1, 368),
    }


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.data_too_large])
@given(layouts(), st.data())
def test_writing_goes_on_after_any_cut(layout: NeuronLayout, data: st.DataObject) -> None:
    layers = [random_rows(layout, i) for i in range(layout.layers)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_neurons(folder, layout, lambda i: layers[i], lambda _: None)
        paths = [folder / Manifest.neurons_file, folder / Manifest.neurons_checksums_file]
        whole = [path.read_bytes() for path in paths]
        assert [len(w) for w in whole] == [layout.file_bytes, layout.layers * layout.blocks * 4]
        for path in paths:
            os.truncate(path, data.draw(st.integers(0, path.stat().st_size)))
        if data.draw(st.booleans()):  # the length is kept, the contents are lost
            size = paths[1].stat().st_size
            lost = min(size, layout.blocks * 4)
            paths[1].write_bytes(paths[1].read_bytes()[: size - lost] + bytes(lost))
        write_neurons(folder, layout, lambda i: layers[i], lambda _: None)
        assert [path.read_bytes() for path in paths] == whole


# -- safetensors headers -------------------------------------------------------------------------------------


def with_header(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


LYING = {
    "empty": b"",
    "short": b"\1\0\0",
    "huge": with_header({}, length=1 << 62),
    "longer than the file": with_header({}, length=3),
    "no JSON": with_header(b"{]"),
    "no UTF-8": with_header(b'{"\xff": 1}'),
    "no object": with_header([1]),
    "deep": with_header(b"[" * 100_000),
    "no fields": with_header({"a": 1}),
    "no offsets": with_header({"a": {"dtype": "U8", "shape": [1]}}, b"1"),
    "three offsets": with_header({"a": {**entry(0, 1), "data_offsets": [0, 1, 2]}}, b"1"),
    "negative": with_header({"a": entry(-1, 1)}, b"12"),
    "backwards": with_header({"a": entry(1, 0, [1])}, b"1"),
    "a boolean": with_header({"a": entry(0, 1, [True])}, b"1"),
    "a float": with_header({"a": entry(0, 1, [1.0])}, b"1"),
    "huge shape": with_header({"a": entry(0, 1, [1 << 61, 1 << 61])}, b"1"),
    "past the end": with_header({"a": entry(0, 9)}, b"1"),
    "before the end": with_header({"a": entry(0, 1)}, b"12"),
    "a hole": with_header({"a": entry(0, 1), "b": entry(2, 3)}, b"123"),
    "overlap": with_header({"a": entry(0, 2), "b": entry(1, 3)}, b"123"),
    "wrong size": with_header({"a": entry(0, 3, [3], "F16")}, b"123"),
    "dtype a list": with_header({"a": entry(0, 1, [1], ["U8"])}, b"1"),
}


@pytest.mark.parametrize("case", LYING)
def test_lying_headers_are_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(LYING[case])
    with pytest.raises(ValueError, match=r"header|tensor"):
        tensor_checksums(path)


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=64) | st.builds(with_header, st.binary(max_size=64), st.binary(max_size=9)))
def test_any_bytes_are_a_header_or_a_value_error(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.safetensors"
        path.write_bytes(data)
        with contextlib.suppress(ValueError):
            read_header(path)


def test_written_tensors_are_read_by_mlx(tmp_path: Path) -> None:
    arrays = {
        "b": mx.arange(6.0).reshape(2, 3).astype(mx.bfloat16),
        "a": mx.array([1, 2], mx.uint32),
        "c": mx.zeros(()),
    }
    path = tmp_path / "x.safetensors"
    write_safetensors(path, [(n, a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()])  # type: ignore[misc]
    loaded: Any = mx.load(str(path))
    assert all(mx.array_equal(loaded[name], array).item() for name, array in arrays.items())
    assert list(tensor_checksums(path)) == ["", "b", "a", "c"]
    header, entries = read_header(path)
    assert len(header) % 8 == 0 and entries["b"].shape == (2, 3)


# -- manifests -----------------------------------------------------------------------------------------------


def write_body(folder: Path, body: dict[str, Any]) -> None:
    body["checksum"] = files._digest(body)
    (folder / MANIFEST).write_text(json.dumps(body))


def read_body(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text())


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield from places(tree[key], (*path, key))


HOSTILE: st.SearchStrategy[Any] = st.sampled_from(
    [
        None, True, False, -1, 0, 1, 3, 1 << 39, 1 << 70, 1.5, float("nan"),
        "", "..", "../x", "x/y", "\0", "\ud800", "a" * 999, MANIFEST, "float16", "config.json",
        [], [0], [[]], ["up"], [0, 0], [1, 0], [-1], [99],
        {}, {"": {}}, {"bytes": 1}, {"../x": {"bytes": 1}}, {"sha256": 1, "bytes": 2}, {"bytes": 7, "crc32": {"": -1}},
    ]
)  # fmt: skip
JSON = st.recursive(
    HOSTILE | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@pytest.fixture(scope="module")
def module_store(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(store, tmp_path_factory.mktemp("stores") / "store"))


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_lying_manifest_is_refused_or_harmless(module_store: Path, store: Path, data: st.DataObject) -> None:
    body = read_body(store)
    for _ in range(data.draw(st.integers(1, 2))):
        *path, key = data.draw(st.sampled_from(list(places(body))))
        parent = body
        for step in path:
            parent = parent[step]
        match data.draw(st.sampled_from(["replace", "replace", "delete", "rename"])):
            case "replace":
                parent[key] = copy.deepcopy(data.draw(HOSTILE | JSON))
            case "delete":
                del parent[key]
            case "rename" if isinstance(parent, dict):
                name = data.draw(HOSTILE)
                parent[name if isinstance(name, str) else "new"] = parent.pop(key)
    write_body(module_store, body)
    try:
        manifest = read_manifest(module_store)
    except StoreError:
        return
    assert manifest.layout.problem() is None and manifest.problem() is None
    assert manifest.files[Manifest.neurons_file]["bytes"] == manifest.layout.file_bytes
    assert all((module_store / name).resolve().parent == module_store.resolve() for name in manifest.files)


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_manifests_are_refused(module_store: Path, store: Path, data: st.DataObject) -> None:
    whole = (store / MANIFEST).read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        damaged = whole[:at]
    else:
        damaged = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    (module_store / MANIFEST).write_bytes(damaged)
    with contextlib.suppress(StoreError):
        assert read_manifest(module_store) == read_manifest(store)  # white space does not matter


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], type[StoreError], str]] = {
    "newer": (lambda b: b.update(version=files.VERSION + 1), NewerFormatError, "Upgrade"),
    "older": (lambda b: b.update(version=files.VERSION - 1), OlderFormatError, "Convert"),
    "version true": (lambda b: b.update(version=True), CorruptStoreError, "not the manifest"),
    "other format": (lambda b: b.update(format="x"), CorruptStoreError, "not the manifest"),
    "no layout": (lambda b: b.pop("layout"), CorruptStoreError, "layout"),
    "negative size": (lambda b: b["files"]["config.json"].update(bytes=-1), CorruptStoreError, "size of config.json"),
    "outside": (lambda b: b["files"].update({"../x": {"bytes": 0}}), CorruptStoreError, "a file is named"),
    "parent": (lambda b: b["files"].update({"..": {"bytes": 0}}), CorruptStoreError, "a file is named"),
    "absolute": (lambda b: b["files"].update({"/etc/passwd": {"bytes": 0}}), CorruptStoreError, "a file is named"),
    "no sums": (lambda b: b["files"]["model.safetensors"].pop("crc32"), CorruptStoreError, "checksums of model"),
    "no config": (lambda b: b["files"].pop("config.json"), CorruptStoreError, "lacks config.json"),
    "no bundle": (lambda b: b["files"].pop("neurons.bin"), CorruptStoreError, "lacks neurons.bin"),
    "no table": (lambda b: b["files"].pop("neurons.crc32"), CorruptStoreError, "lacks neurons.crc32"),
    "no weights": (lambda b: b["files"].pop("model.safetensors"), CorruptStoreError, "lacks model.safetensors"),
    "no predictor": (lambda b: b["files"].pop("predictor-shadow.safetensors"), CorruptStoreError, "lacks predictor-sh"),
    "other default": (lambda b: b.update(default_predictor="x"), CorruptStoreError, "default_predictor"),
    "dtype": (lambda b: b["layout"].update(dtype="int8"), CorruptStoreError, "dtype"),
    "bits": (lambda b: b["layout"].update(bits=5), CorruptStoreError, "bits is 5"),
    "group": (lambda b: b["layout"].update(group_size=64), CorruptStoreError, "group_size is 64 at 16 bits"),
    "odd group": (lambda b: b["layout"].update(bits=4, group_size=48), CorruptStoreError, "group_size is 48"),
    "wide group": (lambda b: b["layout"].update(bits=4, group_size=128), CorruptStoreError, "64 numbers do not divide"),
    "resident bits": (lambda b: b.update(resident_bits=4), CorruptStoreError, "resident_bits"),
    "resident type": (lambda b: b.update(resident_bits=[]), CorruptStoreError, "resident_bits"),
    "more layers": (lambda b: b["layout"].update(layers=10**9), CorruptStoreError, "layer"),
    "huge block": (lambda b: b["layout"].update(block_bytes=1 << 39), CorruptStoreError, "neurons.bin has"),
    "piece": (lambda b: b["layout"].update(piece_neurons=1 << 33), CorruptStoreError, "a piece"),
    "field": (lambda b: b["layout"].update(more=1), CorruptStoreError, "more"),
    "far layer": (lambda b: b.update(all_neurons_layers=[99]), CorruptStoreError, "all_neurons_layers"),
    "no share": (lambda b: b["predictors"]["lowrank"]["active"].__setitem__(0, 1.5), CorruptStoreError, "from 0 to 1"),
    "no share in the table": (
        lambda b: b["predictors"]["lowrank"]["table"]["caught"][0].__setitem__(0, 10**30), CorruptStoreError, "caught"
    ),
    "short report": (lambda b: b["predictors"]["lowrank"].update(recall=[]), CorruptStoreError, "recall"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGES)
def test_each_lie_has_its_error(own_store: Path, case: str) -> None:
    change, error, words = CHANGES[case]
    body = read_body(own_store)
    change(body)
    write_body(own_store, body)
    with pytest.raises(error, match=words):
        read_manifest(own_store)


def test_broken_manifests(own_store: Path) -> None:
    path = own_store / MANIFEST
    body = read_body(own_store)
    body["decode_tokens"] = 9
    path.write_text(json.dumps(body))
    with pytest.raises(CorruptStoreError, match="own checksum"):
        read_manifest(own_store)
    for text, words in (("{", "JSON"), ("[" * 100_000, "JSON"), ("[]", "not the manifest"), ("", "JSON")):
        path.write_text(text)
        with pytest.raises(CorruptStoreError, match=words):
            read_manifest(own_store)
    with path.open("wb") as file:
        file.truncate(files.MAX_MANIFEST_BYTES + 1)
    with pytest.raises(CorruptStoreError, match="more than"):
        read_manifest(own_store)
    path.unlink()
    with pytest.raises(NotAStoreError, match="is not a store"):
        read_manifest(own_store)
    assert not is_store(own_store)


def test_missing_and_truncated_files(own_store: Path) -> None:
    for name, entry in read_manifest(own_store).files.items():
        path = own_store / name
        whole = path.read_bytes()
        assert len(whole) == entry["bytes"]
        for damaged in (whole[:-1], whole + b"x", b""):
            path.write_bytes(damaged)
            with pytest.raises(TruncatedStoreError, match=name):
                read_manifest(own_store)
        path.unlink()
        with pytest.raises(TruncatedStoreError, match=f"lacks {name}"):
            read_manifest(own_store)
        path.write_bytes(whole)
    read_manifest(own_store)


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("model.safetensors", "model.decoder.layers.0.mlp.up_bias"),
        ("predictor-shadow.safetensors", "1.scales"),
        ("predictor-lowrank.safetensors", "0.a"),
    ],
)
def test_loading_names_a_missing_tensor(
    own_store: Path, open_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, file: str, tensor: str
) -> None:
    arrays: Any = mx.load(str(own_store / file))
    mx.eval(arrays)
    del arrays[tensor]
    mx.save_safetensors(str(own_store / file), arrays)
    body = read_body(own_store)
    body["files"][file] = {"bytes": (own_store / file).stat().st_size, "crc32": tensor_checksums(own_store / file)}
    write_body(own_store, body)
    kind = file.removeprefix("predictor-").removesuffix(".safetensors")
    with pytest.raises(MissingTensorError, match=tensor):
        open_model(own_store, predictor=kind if kind in ("lowrank", "shadow") else "none")
