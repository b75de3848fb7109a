"""Silent damage to streamed files gives an error that names the layer and the unit, and never wrong text.

The tests change a file's bytes while a model runs, as a faulty disk might: flipped bits, zeros, or the bytes of another
place. `verify_unchanged`, which would notice the write, is switched off. Every run must give exactly the right logits,
if the damage was not read, or the error. `pytest -m slow tests/faults` does this a thousand times.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from shutil import copytree
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import QUANTISED, Tiny, write_tokenizer  # type: ignore[import-not-found]
from mixtures import VOCABULARY, make_mixture  # type: ignore[import-not-found]
from mlx_lm.models.cache import make_prompt_cache

from mlx_flash.errors import CheckpointError, ReadError, UnsupportedModelError
from mlx_flash.flash.files import Manifest
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.unit_file import UnitFile
from mlx_flash.flash.unit_sums import RANGE_BYTES, Ranges, RangeSums, make_sums
from mlx_flash.loading import in_place_loading, verification
from mlx_flash.loading import load as loading
from mlx_flash.loading.in_place_model import open_in_place
from mlx_flash.loading.options import LoadOptions
from mlx_flash.loading.resident_weights import ranges_in
from mlx_flash.loading.verification import known_sha256
from mlx_flash.source.checkpoint_tensors import tensors_in

PROMPT = [5, 17, 80, 3, 44, 61, 9, 9, 30]
STORES = [("float32", "none"), ("float32", "exact"), ("4 bits", "shadow"), ("gated 8 bits", "exact")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(model: Any) -> list[np.ndarray]:
    """Logits of a prompt and of single tokens after it."""
    cache = make_prompt_cache(model)
    calls = [PROMPT, [4], [9], [77]]
    return [np.array(model(mx.array([call]), cache=cache).astype(mx.float32)) for call in calls]


@contextlib.contextmanager
def damaged(path: Path, place: int) -> Iterator[None]:
    """Flips one bit of the byte at `place` within the block."""
    contents = path.read_bytes()
    changed = bytearray(contents)
    changed[place] ^= 2
    write(path, bytes(changed))
    yield
    write(path, contents)


def lie(data: np.ndarray, begin: int, length: int, rng: np.random.Generator) -> None:
    """Changes at least one bit of `length` bytes at `begin`, as a disk might."""
    here = data[begin : begin + length]
    before = here.copy()
    kind = rng.integers(3)
    if kind == 1:
        here[:] = 0
    elif kind == 2:
        other = int(rng.integers(0, len(data) - length))
        here[:] = data[other : other + length].copy()
    if kind == 0 or np.array_equal(here, before):
        for place in rng.integers(0, length, rng.integers(1, 9)):
            here[place] ^= np.uint8(1 << rng.integers(8))
        if np.array_equal(here, before):
            here[0] ^= 1


class Campaign:
    """Runs a model over damaged files. seen: the number of right logits and of errors."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(UnitFile, "verify_unchanged", lambda file: None)
        self.model = model
        self.expected = logits(model)
        self.seen = {"right": 0, "error": 0}

    def run(self, path: Path, begin: int, length: int, unit: str, rng: np.random.Generator) -> None:
        """unit: a regular expression for the error if `length` bytes at `begin` are damaged."""
        sound = path.read_bytes()
        data = np.frombuffer(sound, np.uint8).copy()
        lie(data, begin, length, rng)
        write(path, data.tobytes())
        try:
            found = logits(self.model)
        except ReadError as error:
            assert re.search(unit, str(error)) and "checksum" in str(error) and str(path) in str(error)
            self.seen["error"] += 1
        else:
            for a, b in zip(found, self.expected, strict=True):
                assert np.array_equal(a, b), "WRONG"
            self.seen["right"] += 1
        finally:
            write(path, sound)

    def finish(self, times: int) -> None:
        for a, b in zip(logits(self.model), self.expected, strict=True):
            assert np.array_equal(a, b)
        assert sum(self.seen.values()) == times and self.seen["error"] > times // 3
        assert self.model.flash.streamer.reader.outstanding == 0
        print(f"{times} damages: {self.seen['error']} errors, {self.seen['right']} right, 0 wrong")  # pytest -s


def write(path: Path, contents: bytes) -> None:
    with path.open("r+b") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())


TIMES = [6, pytest.param(167, marks=pytest.mark.slow)]  # six models: 36 runs, or a thousand


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("name", "predictor"), STORES)
def test_neurons(
    tiny_of: Callable[[str], Tiny],
    open_model: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    predictor: str,
    times: int,
) -> None:
    """Reads whole blocks and, with the exact predictor, the parts of blocks that its slots hold."""
    store = Path(copytree(tiny_of(name).store, tmp_path / "store"))
    layout = tiny_of(name).manifest.layout
    campaign = Campaign(open_model(store, slots=3, predictor=predictor), monkeypatch)
    rng = np.random.default_rng(times)
    for _ in range(times):
        layer, block = int(rng.integers(layout.layers)), int(rng.integers(layout.blocks))
        begin = layer * layout.layer_bytes + block * layout.block_bytes
        unit = re.escape(layout.name_blocks(layer, block, block + 1)) + "[:-]"
        campaign.run(store / Manifest.neurons_file, begin, layout.block_bytes, unit, rng)
    campaign.finish(times)


@pytest.mark.parametrize("name", ["float32", *QUANTISED])
def test_slots_with_parts_of_blocks_are_compared(
    tiny_of: Callable[[str], Tiny],
    open_model: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Covers decoding only. The data of the resident first projection is not read again, but the rest is."""
    store = Path(copytree(tiny_of(name).store, tmp_path / "store"))
    layout = tiny_of(name).manifest.layout
    model = open_model(store, slots=2, predictor="exact")
    monkeypatch.setattr(UnitFile, "verify_unchanged", lambda file: None)
    expected = np.array(model(mx.array([[5]])))
    path = store / Manifest.neurons_file
    blocks = np.frombuffer(path.read_bytes(), np.uint8).copy()
    layers = blocks.reshape(layout.layers, -1)[:, : layout.blocks * layout.block_bytes]
    each = layers.reshape(layout.layers, layout.blocks, -1)
    first, rest = layout.part_range(layout.parts[:1])[1], layout.part_range(layout.parts[1:])[1]
    each[:, :, :first] ^= 1
    write(path, blocks.tobytes())
    assert np.array_equal(np.array(model(mx.array([[5]]))), expected)
    each[:, :, first + rest - 1] ^= 1
    write(path, blocks.tobytes())
    with pytest.raises(ReadError, match=r"layer 0, neurons? \d+.*checksum"):
        model(mx.array([[7]]))


@pytest.mark.parametrize("predictor", ["none", "exact", "shadow"])
def test_a_store_that_was_damaged_before_it_is_loaded(own_store: Path, predictor: str, tiny: Tiny) -> None:
    path, layout = own_store / Manifest.neurons_file, tiny.manifest.layout
    contents = np.frombuffer(path.read_bytes(), np.uint8).copy()
    contents[layout.layer_bytes + 17 :: layout.block_bytes] ^= 4
    write(path, contents.tobytes())
    with pytest.raises(ReadError, match=r"neurons\.bin: layer 1, neurons? \d+.*checksum.*mlx_flash.check"):
        model, _ = loading.load(own_store, predictor=predictor, memory="4GB")
        logits(model)


def test_a_damaged_table_of_sums_is_refused(own_store: Path, tiny: Tiny) -> None:
    path = own_store / Manifest.neurons_checksums_file
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(Exception, match=r"neurons\.crc32 does not match its checksum"):
        loading.load(own_store)


# -- experts ----------------------------------------------------------------------------------------------------


@pytest.fixture
def open_mixture(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads a mixture with so many slots per layer and with compared experts."""
    opened: list[Any] = []

    def load(folder: Path, slots: int = 2, verify: bool = True, say: Callable[[str], None] = lambda _: None) -> Any:
        real = in_place_loading.plan_for_budget

        def share(*arguments: Any, **options: Any) -> Any:
            plan = real(*arguments, **options)
            return replace(plan, slots=(slots,) * len(plan.slots))

        monkeypatch.setattr(in_place_loading, "plan_for_budget", share)
        options = LoadOptions(threads=4, context=64, verify=verify)
        _, build, *_ = in_place_loading.plan_in_place(folder, open_in_place(folder), options)
        opened.append(build(say))
        monkeypatch.setattr(in_place_loading, "plan_for_budget", real)
        return opened[-1]

    yield load
    for model in opened:
        model.flash.close()


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(
    ("family", "quantisation", "shards"), [("qwen3_moe", "4 bits", 3), ("gpt_oss", "plain", 1)], ids=["qwen", "gpt"]
)
def test_experts(
    open_mixture: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    quantisation: str,
    shards: int,
    times: int,
) -> None:
    """Experts are read in place, from files without checksums, for which `--verify` makes some."""
    folder = make_mixture(tmp_path / "mixture", family, quantisation, shards)
    campaign = Campaign(open_mixture(folder), monkeypatch)
    streamer = campaign.model.flash.streamer
    rng = np.random.default_rng(times)
    parts = [
        (layer, name, tensor, expert)
        for layer, tensors in streamer.layers.items()
        for name, tensor in tensors.items()
        for expert in range(len(tensor.offsets))
        if not tensor.is_table
    ]
    for _ in range(times):
        layer, name, tensor, expert = parts[rng.integers(len(parts))]
        path = streamer.files[int(tensor.file_of[expert])].path
        unit = rf"{re.escape(layer)}, expert {expert}, {re.escape(name)}: "
        campaign.run(path, int(tensor.offsets[expert]), tensor.nbytes, unit, rng)
    campaign.finish(times)


def test_sums_are_made_once_and_again_for_other_files(
    open_mixture: Any, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def noting(file: UnitFile, *arguments: Any) -> RangeSums:
        made.append(file.path.name)
        return make_sums(file, *arguments)

    monkeypatch.setattr("mlx_flash.loading.verification.make_sums", noting)
    folder = make_mixture(tmp_path / "mixture", "qwen3_moe", shards=2)
    said: list[str] = []
    expected = logits(open_mixture(folder, verify=False))
    assert not made and not own_cache.exists()
    first, second = sorted(path.name for path in folder.glob("*.safetensors"))
    open_mixture(folder, say=said.append)
    assert sorted(made) == [first, second] and "no SHA-256 from the Hub" in said[-1]
    assert all(np.array_equal(a, b) for a, b in zip(logits(open_mixture(folder)), expected, strict=True))
    assert len(made) == 2

    os.utime(folder / second)  # the bytes may have changed
    kept = sorted((own_cache / "sums").iterdir())
    assert len(kept) == 2
    open_mixture(folder)
    assert made[2:] == [second] and sorted((own_cache / "sums").iterdir()) == kept
    damaged = bytearray(kept[0].read_bytes())
    damaged[-3] ^= 1
    kept[0].write_bytes(damaged)
    open_mixture(folder)
    assert len(made) == 4

    folder.rename(tmp_path / "elsewhere")
    open_mixture(tmp_path / "elsewhere")
    assert len(made) == 6 and len(list((own_cache / "sums").iterdir())) == 2, "those of the old place are gone"


def test_sums_that_cannot_be_kept(open_mixture: Any, tmp_path: Path, own_cache: Path) -> None:
    own_cache.write_bytes(b"a file where the folder should be")
    folder = make_mixture(tmp_path / "mixture", "mixtral")
    said: list[str] = []
    model = open_mixture(folder, say=said.append)
    assert "cannot be kept" in said[-1] and all(file.sums is not None for file in model.flash.streamer.files)


@pytest.mark.parametrize("how", ["cache", "local folder"])
def test_files_are_compared_with_what_the_hub_has(open_mixture: Any, tmp_path: Path, how: str) -> None:
    folder = make_mixture(tmp_path / "models--owner--name" / "snapshots" / ("0" * 40), "mixtral")
    path = folder / "model.safetensors"
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if how == "cache":
        real = folder.parent.parent / "blobs" / sha256
        real.parent.mkdir()
        path.rename(real)
        path.symlink_to(real)
    else:
        real = path
        note = folder / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
        note.parent.mkdir(parents=True)
        note.write_text(f"{'0' * 40}\n{sha256}\n{path.stat().st_mtime + 0.01}\n")
    assert known_sha256(path) == sha256
    said: list[str] = []
    open_mixture(folder, say=said.append)
    assert not any("SHA-256" in text for text in said)
    status = real.stat()
    contents = bytearray(real.read_bytes())
    contents[-5] ^= 1
    itself = f"{re.escape(str(real))}, where it leads, and" if how == "cache" else "it and"
    write(real, bytes(contents))
    os.utime(real, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(
        CheckpointError, match=rf"not the file that the Hub has: .* expected {sha256}\. Delete {itself}"
    ):
        open_mixture(folder)


def test_a_file_that_is_newer_than_its_note_is_still_compared(
    open_mixture: Any, tmp_path: Path, own_cache: Path
) -> None:
    folder = make_mixture(tmp_path / "mixture", "mixtral")
    path = folder / "model.safetensors"
    note = folder / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
    note.parent.mkdir(parents=True)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    note.write_text(f"{'0' * 40}\n{sha256}\n{path.stat().st_mtime - 1000}\n")
    open_mixture(folder)  # newer, as after `cp -r`, but the same bytes
    contents = bytearray(path.read_bytes())
    contents[-5] ^= 1
    write(path, bytes(contents))
    with pytest.raises(CheckpointError, match=rf"expected {sha256}\. Delete .* on purpose, remove .*\.metadata\."):
        open_mixture(folder)
    assert known_sha256(path) == sha256
    note.unlink()  # as the error tells the user
    open_mixture(folder)


def test_kept_sums_are_compared_with_what_the_hub_has_once_it_is_known(
    open_mixture: Any, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_mixture(tmp_path / "mixture", "mixtral")
    path = folder / "model.safetensors"
    open_mixture(folder)  # there is no note yet
    note = folder / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'0' * 40}\n{'a' * 64}\n9e9\n")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="not the file that the Hub has"):
            open_mixture(folder)
    note.write_text(f"{'0' * 40}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n9e9\n")
    # The file's sums are kept, so it is not read again.
    monkeypatch.setattr("mlx_flash.loading.verification.make_sums", None)
    open_mixture(folder)


# -- files that are loaded once -----------------------------------------------------------------------------------


@pytest.fixture
def same_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """A faulty disk changes no times, so files are told apart by their paths alone."""
    monkeypatch.setattr(verification, "_named", lambda path, _: {"path": str(path)})


@pytest.mark.usefixtures("same_times")
def test_every_tensor_that_is_loaded_once(open_mixture: Any, tmp_path: Path) -> None:
    folder = make_mixture(tmp_path / "mixture", "qwen3_moe", "4 bits", shards=2)
    expected = logits(open_mixture(folder))
    found = open_in_place(folder)
    names = sorted(found.tensors.keys() - found.behind(found.streamed))
    assert len(names) > 40
    for name in names[::7]:
        number, entry = found.entries[name]
        with damaged(found.files[number], entry.begin + (entry.end - entry.begin) // 2), pytest.raises(
            ReadError, match=rf"{re.escape(str(found.files[number]))}: tensor {re.escape(name)} does not match its"
        ):  # fmt: skip
            open_mixture(folder)
    assert all(np.array_equal(a, b) for a, b in zip(logits(open_mixture(folder)), expected, strict=True))


@pytest.mark.usefixtures("same_times")
def test_a_tensor_that_the_zoo_makes_something_else_of(
    open_mixture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No parameter is this tensor, but its data is compared."""
    from mlx_lm.models import mixtral

    changed = ("lm_head.weight", "model.norm.weight")
    monkeypatch.setattr(
        mixtral.Model, "sanitize", lambda _, weights: {k: w * 2 if k in changed else w for k, w in weights.items()}
    )
    folder = make_mixture(tmp_path / "mixture", "mixtral")
    found = open_in_place(folder)
    open_mixture(folder)
    for name in changed:
        assert name not in found.sources
        with damaged(found.files[0], found.entries[name][1].begin), pytest.raises(
            ReadError, match=rf"tensor {name} does not match its checksum"
        ):  # fmt: skip
            open_mixture(folder)
    open_mixture(folder)


def exchange_names(entries: dict[str, Any]) -> None:
    """Exchanges two tensors of one size, so that the kept sums fit."""
    one, other = (f"model.layers.{layer}.input_layernorm.weight" for layer in range(2))
    entries[one], entries[other] = entries[other], entries[one]


def exchange_places(entries: dict[str, Any]) -> None:
    """Exchanges two tensors of different sizes, whose new places have no sums."""
    names = sorted(entries.keys() - {"__metadata__"}, key=lambda name: entries[name]["data_offsets"])
    sizes = {name: entries[name]["data_offsets"][1] - entries[name]["data_offsets"][0] for name in names}
    one, other = next((a, b) for a, b in pairwise(names) if sizes[a] != sizes[b])
    begin = entries[one]["data_offsets"][0]
    entries[other]["data_offsets"] = [begin, begin + sizes[other]]
    entries[one]["data_offsets"] = [begin + sizes[other], begin + sizes[other] + sizes[one]]


@pytest.mark.usefixtures("same_times")
@pytest.mark.parametrize("change", [exchange_names, exchange_places])
def test_a_header_that_says_something_else(
    open_mixture: Any, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    """At every read, and only at the first one."""
    folder = make_mixture(tmp_path / "mixture", "qwen3_moe", "4 bits")
    expected = logits(open_mixture(folder))
    path = folder / "model.safetensors"
    contents = path.read_bytes()
    begin = 8 + int.from_bytes(contents[:8], "little")
    entries = json.loads(contents[8:begin])
    change(entries)
    changed = json.dumps(entries, separators=(",", ":")).encode().ljust(begin - 8)
    write(path, contents[:8] + changed + contents[begin:])
    assert path.stat().st_size == len(contents)
    named = re.escape(str(path))
    with pytest.raises(ReadError, match=rf"{named}(: its header)? does not match its checksum"):
        open_mixture(folder)

    def sound_again(*_: Any) -> Any:
        write(path, contents)
        return ranges_in(*_)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ReadError, match=rf"{named}: its header does not match"):
        patch.setattr(in_place_loading, "ranges_in", sound_again)
        patch.setattr(UnitFile, "verify_unchanged", lambda _: None)
        open_mixture(folder)
    assert all(np.array_equal(a, b) for a, b in zip(logits(open_mixture(folder)), expected, strict=True))


def test_a_tensor_that_is_more_than_experts(open_mixture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts' parts have sums, but the tensor has none."""
    from mlx_lm.models import qwen3_moe

    folder = make_mixture(tmp_path / "mixture", "qwen3_moe", "4 bits")
    scales = "model.layers.0.mlp.switch_mlp.up_proj.scales"
    monkeypatch.setattr(
        qwen3_moe.Model,
        "sanitize",
        lambda _, weights: weights | {"model.norm.weight": weights[scales].reshape(-1)[:64] * 1},
    )
    open_mixture(folder, verify=False)
    with pytest.raises(UnsupportedModelError, match=rf"more than experts of {scales}, and --verify cannot .* without"):
        open_mixture(folder)


def test_a_file_that_begins_with_a_tensor_that_does_not_count(open_mixture: Any, tmp_path: Path) -> None:
    folder = make_mixture(tmp_path / "mixture", "mixtral", shards=2)
    weights = {name: path.name for name, (path, _) in tensors_in(folder).items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    first, second = sorted(folder.glob("*.safetensors"))
    header = second.read_bytes()[8 : 8 + int.from_bytes(second.read_bytes()[:8], "little")]
    body = second.read_bytes()[8 + len(header) :]
    entries = json.loads(header)
    for entry in entries.values():
        if entry is not None and "data_offsets" in entry:
            entry["data_offsets"] = [offset + 256 for offset in entry["data_offsets"]]
    entries = {"model.norm.weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}} | {
        name: entry for name, entry in entries.items() if entry is not None
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    second.write_bytes(len(text).to_bytes(8, "little") + text + bytes(256) + body)
    assert weights["model.norm.weight"] == first.name
    for _ in range(2):
        logits(open_mixture(folder))


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 60_000,
        b"",
        b"\n",
        json.dumps({"identity": {"path": "/" + "a" * 5000}}).encode(),
        b"{" + b" " * 99_000,
        None,
    ],
)
def test_other_files_among_the_sums_hinder_nothing(
    open_mixture: Any, tmp_path: Path, own_cache: Path, content: bytes | None
) -> None:
    folder = make_mixture(tmp_path / "mixture", "mixtral")
    (own_cache / "sums").mkdir(parents=True)
    for name in (f"{'0' * 31}7.sums", verification._place(folder / "model.safetensors").name):
        if content is None:
            os.mkfifo(own_cache / "sums" / name)
        else:
            (own_cache / "sums" / name).write_bytes(content)
    said: list[str] = []
    open_mixture(folder, say=said.append)
    assert not any("cannot be kept" in text for text in said)
    kept = verification._kept(folder / "model.safetensors", UnitFile(folder / "model.safetensors").identity)
    assert kept is not None


@pytest.mark.usefixtures("same_times")
def test_small_files_of_a_mixture(tmp_path: Path) -> None:
    """A library reads the bytes that were compared."""
    folder = make_mixture(tmp_path / "mixture", "qwen3_moe", shards=2)
    write_tokenizer(folder, VOCABULARY)
    weights = {name: path.name for name, (path, _) in tensors_in(folder).items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")

    def opened() -> None:
        loading.load(folder, context=64, verify=True)[0].flash.close()

    opened()
    names = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert len(names) == 5
    for name in names:
        path = folder / name
        with damaged(path, path.stat().st_size // 2), pytest.raises(
            ReadError, match=rf"{re.escape(str(path))} does not match its checksum: .* Start again"
        ):  # fmt: skip
            opened()
    opened()


def test_small_files_are_compared_with_what_the_hub_has(tmp_path: Path) -> None:
    """The Hub identifies a file outside of large file storage by its git hash."""
    path = tmp_path / "config.json"
    path.write_text("{}\n")
    note = tmp_path / ".cache" / "huggingface" / "download" / "config.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'0' * 40}\n0967ef424bce6791893e9a57bb952f80fd536e93\n9e9\n")  # from `git hash-object`
    verification.compare_small_file(path, path.stat(), path.read_bytes())
    path.write_text("{ }")
    with pytest.raises(CheckpointError, match=r"config\.json is not .* SHA-1 in git is .* 0967ef4.* remove .*metadata"):
        verification.compare_small_file(path, path.stat(), path.read_bytes())


@pytest.mark.parametrize("note", ["", "x", f"{'0' * 40}\n{'a' * 40}\n9e9\n", f"c\n{'a' * 64}\nnever\n"])
def test_what_is_not_known_of_a_file(tmp_path: Path, note: str) -> None:
    """Notes that are damaged, or that do not belong to a file in large file storage."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    place = tmp_path / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
    place.parent.mkdir(parents=True)
    place.write_text(note)
    assert known_sha256(path) is None


def test_units_longer_than_a_range(tmp_path: Path) -> None:
    path = tmp_path / "units.bin"
    contents = np.random.default_rng(0).integers(0, 256, 3 * RANGE_BYTES + 999, np.uint8)
    path.write_bytes(contents.tobytes())
    offsets = np.array([7, 7, RANGE_BYTES + 500], np.int64)
    lengths = np.array([9, 9, 2 * RANGE_BYTES + 5], np.int64)
    target = np.zeros(len(contents), np.uint8)
    with UnitFile(path) as file, Reader(2) as reader:
        file.sums = make_sums(file, reader, Ranges.of_units(offsets, lengths), lambda view: None, lambda n: None)
        assert len(file.sums.sums) == 4
        reader.read(file, offsets[1:], target.ctypes.data + offsets[1:], lengths[1:])
        assert np.array_equal(target[offsets[2] :][: lengths[2]], contents[offsets[2] :][: lengths[2]])
        for offset, length in ((8, 8), (7, 8), (0, 16)):
            with pytest.raises(ValueError, match="no sums"):  # bytes without sums are not read
                reader.submit(file, np.array([offset]), np.array([target.ctypes.data]), np.array([length]))
        contents[offsets[2] + RANGE_BYTES] ^= 1
        write(path, contents.tobytes())
        with pytest.raises(ReadError, match=f"read at {2 * RANGE_BYTES + 500} have the checksum"):
            reader.read(file, offsets[2:], target.ctypes.data + offsets[2:], lengths[2:])
    with pytest.raises(ValueError, match="units of a file overlap"):
        Ranges.of_units(np.array([0, 5]), np.array([6, 6]))
