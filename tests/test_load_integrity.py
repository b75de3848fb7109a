"""The files that loading reads once: damage and broken disks end in an error that names the file and the tensor."""

from __future__ import annotations

import builtins
import errno
import io
import itertools
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import Tiny, change_manifest, write_tokenizer  # type: ignore[import-not-found]
from mixtures import VOCABULARY, make_mixture  # type: ignore[import-not-found]
from mlx_lm.utils import load_model
from published_layouts import publish  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.errors import (
    BudgetError,
    CheckpointError,
    CorruptStoreError,
    FlashError,
    ReadError,
    UnsupportedModelError,
    UsageError,
)
from mlx_flash.flash.files import Manifest, parse_manifest, read_manifest
from mlx_flash.flash.safetensors_file import read_header
from mlx_flash.flash.stored_tensors import StoredTensors
from mlx_flash.loading import load as loading
from mlx_flash.loading import runtime
from mlx_flash.loading import store as store_module
from mlx_flash.loading.in_place_model import open_in_place
from mlx_flash.loading.load import load
from mlx_flash.loading.provenance import is_as_loaded
from mlx_flash.loading.resident_weights import read_resident
from mlx_flash.source.checkpoint_files import MAX_SMALL_BYTES
from mlx_flash.source.compared_copies import compared_copies, name_themselves

TOKENS = mx.array([[5, 17, 80, 3]])


def flip(path: Path, place: int) -> None:
    """Flips one bit of one byte."""
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x10]))


def kind_of(file: str) -> str:
    """The predictor that the file belongs to."""
    return file.removeprefix("predictor-").removesuffix(".safetensors") if file.startswith("predictor-") else "none"


def cut_after_opening(monkeypatch: pytest.MonkeyPatch, name: str, size: int) -> None:
    """Truncates a file of this name when MLX opens it for the second time; the first time is for the plan."""
    real, opened = mx.load, itertools.count(1)

    def load_and_cut(path: str) -> Any:
        result = real(path)
        if Path(path).name == name and next(opened) == 2:
            os.truncate(path, size)
        return result

    monkeypatch.setattr(mx, "load", load_and_cut)


# -- a store -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bfloat16", "4 bits"])
def test_a_flipped_bit_in_any_tensor_is_found(tiny_of: Callable[[str], Tiny], tmp_path: Path, name: str) -> None:
    tiny = tiny_of(name)
    for file in (Manifest.resident_file, Manifest.predictor_file("lowrank"), Manifest.predictor_file("shadow")):
        path, sums = tmp_path / file, tiny.manifest.files[file]["crc32"]
        shutil.copyfile(tiny.store / file, path)
        entries = read_header(path)[1]
        for part in (0, 0.5, 1):
            places = [round(entry.begin + part * (entry.end - 1 - entry.begin)) for entry in entries.values()]
            for place in places:
                flip(path, place)
            tensors = StoredTensors(path, sums)
            for tensor in entries:
                with pytest.raises(CorruptStoreError, match=f"{file}: tensor {re.escape(tensor)} does not match its"):
                    tensors.take(tensor)
            for place in places:
                flip(path, place)
        tensors = StoredTensors(path, sums)
        assert [tensors.take(tensor).shape for tensor in entries] == [entry.shape for entry in entries.values()]


@pytest.mark.parametrize("name", ["model.safetensors", "predictor-lowrank.safetensors", "predictor-shadow.safetensors"])
def test_a_model_with_a_flipped_bit_is_not_loaded(own_store: Path, open_model: Callable[..., Any], name: str) -> None:
    *_, (tensor, entry) = read_header(own_store / name)[1].items()
    flip(own_store / name, entry.begin)
    with pytest.raises(CorruptStoreError, match=f"{name}: tensor {re.escape(tensor)} does not match its checksum"):
        open_model(own_store, predictor=kind_of(name))


@pytest.mark.parametrize("name", ["model.safetensors", "predictor-shadow.safetensors"])
def test_a_header_that_is_another_s(own_store: Path, open_model: Callable[..., Any], name: str) -> None:
    """The header is well-formed and of the same length, but would give the same bytes other values."""
    path = own_store / name
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))
    with pytest.raises(CorruptStoreError, match=f"{name}: its header does not match its checksum"):
        open_model(own_store, predictor="shadow")


def test_a_name_that_is_no_text_is_damage(tmp_path: Path) -> None:
    """JSON can spell strings that UTF-8 cannot."""
    header = b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CorruptStoreError, match=r"x\.safetensors cannot be read"):
        StoredTensors(path, {})


def test_mlx_reads_the_header_that_was_checked(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX reads the header a second time."""
    path = own_store / Manifest.resident_file
    sums = parse_manifest(own_store).files[path.name]["crc32"]
    real, content = mx.load, path.read_bytes()

    def another(name: str) -> Any:
        path.write_bytes(content.replace(b'"dtype":"F32"', b'"dtype":"I32"', 1))
        return real(name)

    monkeypatch.setattr(mx, "load", another)
    with pytest.raises(CorruptStoreError, match="is not the one that its checksum belongs to"):
        StoredTensors(path, sums)


def test_tensors_are_compared_where_they_lie(tiny: Tiny) -> None:
    """Tensors are not copied, because the largest may take half of the memory."""
    sums = tiny.manifest.files[Manifest.resident_file]["crc32"]
    tensors = StoredTensors(tiny.store / Manifest.resident_file, sums)
    name = "model.decoder.embed_tokens.weight"
    mx.eval(tensors.arrays[name])
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    array = tensors.take(name)
    assert mx.get_peak_memory() - before < array.nbytes / 2


@pytest.mark.parametrize("name", ["model.safetensors", "predictor-lowrank.safetensors", "predictor-shadow.safetensors"])
def test_a_tensor_that_cannot_be_read_is_named(
    own_store: Path, open_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = own_store / name
    cut_after_opening(monkeypatch, name, path.stat().st_size - 64)
    with pytest.raises(ReadError, match=rf"{name}: tensor \S+ cannot be read: the file ends at byte \d+, before"):
        open_model(own_store, predictor=kind_of(name))


# -- small files ---------------------------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """failing(name) makes files of this name openable but unreadable from now on."""
    real_open = io.open

    def arm(name: str) -> None:

        def fail(path: Any, *arguments: Any, **options: Any) -> Any:
            file = real_open(path, *arguments, **options)
            if isinstance(path, (str, os.PathLike)) and Path(path).name == name:
                file.close()
                raise OSError(errno.EIO, "Input/output error")  # like read(), which knows no file name
            return file

        monkeypatch.setattr(io, "open", fail)
        monkeypatch.setattr(builtins, "open", fail)

    return arm


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_small_file_of_a_store_is_named(own_store: Path, failing: Callable[[str], None], name: str) -> None:
    failing(name)
    with pytest.raises(ReadError, match=rf"{own_store / name} cannot be read: Input/output error\. The disk"):
        load(own_store)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_small_file_of_a_checkpoint_is_named(tmp_path: Path, failing: Callable[[str], None], name: str) -> None:
    folder = make_mixture(tmp_path / "mixtral", "mixtral")
    write_tokenizer(folder, VOCABULARY)
    (folder / "generation_config.json").write_text("{}")
    failing(name)
    with pytest.raises(ReadError, match=rf"{folder / name} cannot be read: Input/output error\. The disk"):
        load(folder)


def test_a_tokenizer_s_own_error_of_a_disk_lists_the_files(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tokenizers reads in Rust. When its read fails, a read in Python may succeed."""

    def fail(*_: Any, **__: Any) -> None:
        raise Exception("Input/output error (os error 5)")

    monkeypatch.setattr("mlx_lm.utils.load_tokenizer", fail)
    with pytest.raises(ReadError, match=r"one of .*tokenizer\.json.* cannot be read: Input/output error"):
        load(own_store)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_libraries_read_what_was_compared(own_store: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The disk returns other bytes at a second read, which would be the library's."""
    path = own_store / name

    def damaged_afterwards(folder: Path) -> Any:
        manifest = read_manifest(folder)
        path.write_bytes(path.read_bytes() + b" ")
        return manifest

    monkeypatch.setattr(store_module, "read_manifest", damaged_afterwards)
    with pytest.raises(CorruptStoreError, match=rf"^{re.escape(str(path))} does not match its checksum"):
        load(own_store)


def test_an_error_of_a_copy_names_the_file_itself(tmp_path: Path) -> None:
    def opened(copy: Path) -> None:
        raise CheckpointError(f"{copy / 'a.json'} is odd")

    (tmp_path / "a.json").write_text("{}")
    with (
        pytest.raises(CheckpointError, match=rf"^{re.escape(str(tmp_path))}/a\.json is odd$"),
        compared_copies(tmp_path, ["a.json"], lambda *_: None) as copy,
    ):
        opened(copy)
    assert not copy.exists()


def test_what_lies_beside_a_store_s_files_is_passed_over(own_store: Path) -> None:
    """Such a file may be a log larger than memory."""
    (own_store / "notes.txt").symlink_to("/proc/self/mem")
    with (own_store / "log.txt").open("wb") as log:
        log.truncate(MAX_SMALL_BYTES + 1)
    load(own_store, context=32)[0].flash.close()


def test_a_template_that_is_larger_than_any(tmp_path: Path) -> None:
    folder = make_mixture(tmp_path / "mixtral", "mixtral")
    write_tokenizer(folder, VOCABULARY)
    path = folder / "additional_chat_templates" / "x.jinja"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(MAX_SMALL_BYTES + 1)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(path))} has 67 MB; a file of its kind has at most 64"):
        load(folder, verify=True)
    with (
        pytest.raises(
            CheckpointError, match=r"x\.jinja has more than 64 MiB, which is too large for a file of its kind"
        ),
        compared_copies(folder, ["additional_chat_templates/x.jinja"], lambda *_: None),
    ):
        pass


def test_a_tokenizer_names_the_folder_and_not_the_copies(own_store: Path) -> None:
    """Tokenizers of sentencepiece read their vocabulary again when they are pickled."""
    model, tokenizer = load(own_store, context=32)
    model.flash.close()
    own = tokenizer._tokenizer
    assert own.name_or_path == str(own_store) and "mlx-flash-" not in repr(vars(own) | own.init_kwargs)
    other = SimpleNamespace(
        vocab_file="/tmp/x  y/mlx-flash-1/tokenizer.model", init_kwargs={"a": "/tmp/x y/mlx-flash-1"}
    )
    name_themselves(other, Path("/tmp/x  y/mlx-flash-1"), own_store)
    assert other.vocab_file == f"{own_store}/tokenizer.model" and other.init_kwargs == {"a": str(own_store)}


def test_a_folder_for_temporary_files_that_is_none(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX compiles in that folder."""
    monkeypatch.setenv("TMPDIR", "/nowhere")
    with pytest.raises(FlashError, match="TMPDIR is /nowhere, which is not a folder that can be written to"):
        load(own_store)


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    make_mixture(tmp_path / "mixtral", "mixtral").rename(folder)
    with pytest.raises(UsageError, match=r"cannot be used: its name.* is not UTF-8 text\. Rename it"):
        load(folder)


def test_no_room_for_the_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text("{}")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nothing"))
    with (
        pytest.raises(
            FlashError, match=r"cannot be copied into the system's temporary folder: .*No such file.* TMPDIR"
        ),
        compared_copies(tmp_path, ["a.json"], lambda *_: None),
    ):
        pass


@pytest.mark.parametrize("content", ["[1]", '{"eos_token_id": \xff}'])
def test_a_generation_config_that_is_none_is_named(own_store: Path, content: str) -> None:
    (own_store / "generation_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CorruptStoreError, match=r"generation_config\.json"):
        load(own_store)


@pytest.mark.parametrize("key", ["num_attention_heads", "num_hidden_layers", "hidden_size"])
def test_whole_numbers_of_a_configuration(own_store: Path, key: str) -> None:
    path = own_store / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {key: float(config[key])}))
    change_manifest(own_store)
    with pytest.raises(
        CorruptStoreError, match=rf"config\.json: {key} is {float(config[key])}, expected a whole number"
    ):
        load(own_store)


# -- a mixture -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_a_resident_tensor_of_a_mixture_that_cannot_be_read_is_named(tmp_path: Path, family: str) -> None:
    folder = make_mixture(tmp_path / family, family, shards=2)
    mixture = open_in_place(folder)
    path = folder / "model-00002-of-00002.safetensors"
    resident = {name for name, _ in mixture.resident()}
    begin = max(entry.begin for name, entry in read_header(path)[1].items() if name in resident)
    os.truncate(path, begin)
    with pytest.raises(ReadError, match=f"00002-of-00002.safetensors cannot be read: .* the file at {begin}"):
        read_resident(mixture)


def test_a_disk_s_error_in_a_resident_tensor_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensor is named even if the error does not recur when the file is examined."""
    folder = make_mixture(tmp_path / "mixtral", "mixtral")
    mixture = open_in_place(folder)
    real = mx.eval

    def fail(array: mx.array) -> None:
        if array.shape == (VOCABULARY, 64):
            raise RuntimeError("[read] Unable to read from file.")
        real(array)

    monkeypatch.setattr(mx, "eval", fail)
    named = r"model\.safetensors: tensor (lm_head|model\.embed_tokens)\.weight"
    with pytest.raises(ReadError, match=rf"{named} cannot be read: \[read\] Unable to read from file\. The disk"):
        read_resident(mixture)


@pytest.mark.parametrize("stacked", [False, True])
def test_experts_that_are_changed_in_place_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stacked: bool
) -> None:
    """`a *= 2` keeps the identity of MLX's array."""
    from mlx_lm.models import mixtral

    folder = make_mixture(tmp_path / "mixtral", "mixtral")
    if stacked:
        publish(folder, "mixtral")
    open_in_place(folder)
    real = mixtral.Model.sanitize

    def scaling(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        result = real(self, weights)
        name = next(name for name in result if "layers.1" in name and "switch_mlp.up_proj" in name)
        result[name] *= 2
        return result

    monkeypatch.setattr(mixtral.Model, "sanitize", scaling)
    with pytest.raises(UnsupportedModelError, match=r"does not store .*layers\.1.*switch_mlp\.up_proj.* in the form"):
        open_in_place(folder)


def test_what_counts_as_loaded(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {"a": mx.ones((2, 3)), "b": mx.ones((2, 3))})
    arrays: Any = mx.load(str(tmp_path / "x.safetensors"))
    a, b = arrays["a"], arrays["b"]
    stack = ["Concatenate", "ExpandDims", "ExpandDims"]
    assert is_as_loaded(a) and is_as_loaded(mx.stack([a, b]), stack) and not is_as_loaded(mx.stack([a]), stack)
    assert is_as_loaded(mx.contiguous(a)) and is_as_loaded(a.T, ["Transpose"]) and not is_as_loaded(a, ["Transpose"])
    for changed in (a + 0, a * 2, a.astype(mx.float16), a.T, mx.zeros((2, 3)), mx.stack([a, b * 2])):
        assert not is_as_loaded(changed) and not is_as_loaded(changed, stack)
    b += 1
    assert not is_as_loaded(b)
    mx.eval(a)
    assert not is_as_loaded(a), "whatever it was before"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts what Linux lists")
def test_a_loaded_mixture_holds_each_file_open_once(tmp_path: Path) -> None:
    folder = make_mixture(tmp_path / "mixtral", "mixtral", shards=3)
    write_tokenizer(folder, VOCABULARY)

    def opened() -> int:
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        targets = [os.readlink(link) for link in links if os.path.islink(link)]
        return sum(target.startswith(str(folder)) for target in targets)

    model, _ = load(folder, context=64)
    assert opened() == 3
    model.flash.close()
    assert opened() == 0


# -- threads, and what is left behind ------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}


def in_another_thread(call: Callable[[], Any]) -> Any:
    results: list[Any] = []

    def work() -> None:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


@pytest.mark.parametrize("scaling", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_a_model_with_scaled_rotations_is_called_in_another_thread(
    tiny_of: Callable[[str], Tiny], tmp_path: Path, open_model: Callable[..., Any], scaling: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(tiny_of("gated 8 bits").store, tmp_path / "store"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    change_manifest(folder)
    model = open_model(folder, predictor="none")
    found = in_another_thread(lambda: np.array(model(TOKENS)))
    assert np.isfinite(found).all()
    assert np.array_equal(found, np.array(open_model(folder, predictor="none")(TOKENS)))


def test_a_mixture_with_scaled_rotations_is_called_in_another_thread(tmp_path: Path) -> None:
    folder = make_mixture(tmp_path / "deepseek", "deepseek_v2")
    write_tokenizer(folder, VOCABULARY)
    model, tokenizer = load(folder, context=64)
    text = in_another_thread(lambda: mlx_flash.generate(model, tokenizer, "abc", max_tokens=3))
    assert text == mlx_flash.generate(model, tokenizer, "abc", max_tokens=3)
    found = in_another_thread(lambda: np.array(model(TOKENS)))
    assert np.array_equal(found, np.array(load_model(folder)[0](TOKENS)))
    model.flash.close()


def test_arrays_in_lists_and_dictionaries_are_evaluated() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._slopes = mx.arange(4.0) * 2
            self._tables: Any = [{"a": mx.arange(3.0) + 1}, (mx.arange(2.0) - 1,)]
            object.__setattr__(self, "hidden", mx.arange(5.0) + 1)

    module = Odd()
    runtime.evaluate_constants(module)
    in_another_thread(lambda: mx.eval(module._slopes, module._tables[0]["a"], module._tables[1][0], module.hidden))


def test_mlx_keeps_as_many_buffers_as_before_once_every_model_is_closed(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = runtime._BufferCache()  # a cache limit that ignores the models that other tests have open
    for module in (runtime, loading):
        monkeypatch.setattr(module, "BUFFER_CACHE", own)
    before = mx.set_cache_limit(123 << 20)
    try:
        first, _ = load(store, context=32)
        second, _ = load(store, context=32)
        with pytest.raises(BudgetError):
            load(store, context=32, memory=1)
        first.flash.close()
        first.flash.close()
        assert mx.set_cache_limit(runtime.MLX_CACHE_BYTES) == runtime.MLX_CACHE_BYTES
        second.flash.close()
        assert mx.set_cache_limit(before) == 123 << 20
    finally:
        mx.set_cache_limit(before)


def test_generate_says_what_mlx_lm_s_says(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load(store, context=32)
    text = mlx_flash.generate(model, tokenizer, "abc", verbose=True, max_tokens=3)
    model.flash.close()
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == lines[2] == "=" * 10 and lines[1] == text
    assert [line.split(":")[0] for line in lines[3:6]] == ["Prompt", "Generation", "Peak memory"]
