"""Contexts on the disk: the same bits as in memory, nothing is trusted that differs, and the bounds hold."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import test_prompt_caches  # type: ignore[import-not-found]
from conftest import write_tokenizer  # type: ignore[import-not-found]
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kept_conversations import MANY, NAME, STEP, ask, fake, kept, names, prompt  # type: ignore[import-not-found]
from mixtures import make_mixture  # type: ignore[import-not-found]
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, QuantizedKVCache, RotatingKVCache
from test_prompt_caches import SIZE, check_alone, check_bytes, fed_alone

from mlx_flash.layers.cache_parts import parts_of
from mlx_flash.loading.load import load
from mlx_flash.text.cached_context import CachedContext
from mlx_flash.text.context_file import ContextToWrite, UnwritableError
from mlx_flash.text.prompt_cache import ReusedPromptCache
from mlx_flash.text.written_context import WrittenContext

FAMILIES = ("mixtral", "qwen3_next", "nemotron_h", "gpt_oss", "quantised")


@pytest.fixture
def notes() -> list[str]:
    return []


# -- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_restart_gives_the_bits_of_a_conversation_in_memory(
    family: str, tmp_path: Path, endless: Any, notes: list[str]
) -> None:
    options: dict[str, Any] = {"kv_bits": 8} if family == "quantised" else {}
    sizes: dict[str, Any] = {"hidden_size": 128, "head_dim": 32} if family == "quantised" else {}
    folder = make_mixture(tmp_path / "model", "qwen3_moe" if family == "quantised" else family, **sizes)
    write_tokenizer(folder)
    model, _ = load(folder, memory="4GB", **options)
    in_memory = ReusedPromptCache(model)
    in_memory.planned_bytes = MANY
    on_disk = kept(tmp_path, model, notes)
    on_disk.planned_bytes = 1 << 20
    first, other = prompt(1, 41), prompt(2, 20)
    made: list[int] = []
    for ids in (first, other, None, first[:33] + prompt(3, 5)):
        asked = ids or [*first, *made, *prompt(4, 9)]
        got, bits = ask(in_memory, endless, asked, system_tokens=32)
        assert ask(on_disk, endless, asked, system_tokens=32) == (got, bits)
        assert on_disk.reused == in_memory.reused
        made = made or got
        on_disk.close()
        on_disk = kept(tmp_path, model, notes)
        on_disk.planned_bytes = 1 << 20
    assert in_memory.reused >= 32 and notes == []
    model.flash.close()


@settings(max_examples=20, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.sampled_from(sorted(test_prompt_caches.KINDS)), st.sampled_from([0, 3 * SIZE]))
def test_any_sequence_of_conversations_and_restarts(
    endless: Any, tmp_path_factory: Any, seed: int, kind: str, planned: int
) -> None:
    choose = np.random.default_rng(seed)
    root = tmp_path_factory.mktemp("kept")
    notes: list[str] = []
    model = fake(kind, planned)
    turns = kept(root, model, notes)
    histories = [[7] * 5 + [20 + number] for number in range(3)]
    fed: list[tuple[int, list[int]]] = []
    for _ in range(10):
        if choose.random() < 0.3:
            turns.close()
            turns = kept(root, model, notes)
        number, new, fresh = choose.integers(0, 3), choose.integers(1, 30), choose.random() < 0.2
        back, left = choose.choice([0, 0, 0, 2, 7, 30]), choose.choice([0, 0, 0, 8])
        history = histories[number]
        asked = history[: max(1, len(history) - back)] + choose.integers(40, 90, new).tolist()
        if choose.random() < 0.2 and fed:  # the same request again
            length, tokens = fed[-1]
            asked = (tokens + asked)[:length]
        if len(asked) > 290:
            continue

        def leave(done: int, _total: int, left: int = left) -> None:
            if left and done >= left:
                raise InterruptedError

        options: Any = {"prefill_step_size": STEP, "system_tokens": 5, "fresh": fresh}
        responses = turns.stream_generate(endless, asked, 4, prompt_progress_callback=leave, **options)
        made: list[int] = []
        assert turns.tokens == asked[: turns.reused]
        with closing(responses), suppress(InterruptedError):
            made += [response.token for response in responses]
        check_bytes(turns)
        for context in (*turns._kept, turns._last):
            check_alone(fed_alone(context), context.tokens, [*fed, (len(asked), turns.tokens)])
        histories[number] = asked + made
        fed.append((len(asked), list(turns.tokens)))
    assert notes == []


def test_every_class_of_cache_comes_back_bit_by_bit() -> None:
    def filled(part: Any, count: int, dtype: Any) -> Any:
        for _ in range(count):
            numbers = mx.random.normal((1, 2, 1, 64)).astype(dtype)
            part.update_and_fetch(numbers, numbers + 1)
        return part

    arrays = ArraysCache(3)
    arrays[0], arrays[1] = mx.random.normal((1, 3, 5)).astype(mx.bfloat16), mx.array([[True, False]])
    transposed = mx.random.normal((2, 3, 4, 5)).transpose(0, 3, 1, 2)
    arrays.lengths = transposed
    fresh = [
        KVCache(), RotatingKVCache(8, keep=2), RotatingKVCache(300), QuantizedKVCache(32, 4), ArraysCache(3),
        CacheList(KVCache(), ArraysCache(1)), KVCache(),
    ]  # fmt: skip
    cache = [
        filled(KVCache(), 20, mx.bfloat16), filled(RotatingKVCache(8, keep=2), 20, mx.float16),
        filled(RotatingKVCache(300), 20, mx.bfloat16), filled(QuantizedKVCache(32, 4), 20, mx.float32), arrays,
        CacheList(filled(KVCache(), 20, mx.float16), ArraysCache(1)), filled(KVCache(), 20, mx.float32),
    ]  # fmt: skip
    context = CachedContext(cache, STEP, list(range(20)), [8, 16], [19], 4, True)
    context.snapshot()
    data = written(context)
    with io_file(data) as file:
        made = WrittenContext("x", file).read_into(fresh, file, 20, 30, MANY)
    for name in ("step", "tokens", "stops", "ends", "as_read", "decoded"):
        assert getattr(made, name) == getattr(context, name)
    for part, own in zip(parts_of(made.cache), parts_of(cache), strict=True):
        same(vars(part), vars(own), len(context.tokens) if type(own) in (KVCache, QuantizedKVCache) else None)
    ((place, snapshot),) = made.snapshots.items()
    assert place == 20 and snapshot.nbytes == context.snapshots[20].nbytes
    for part, own in zip(snapshot.parts, context.snapshots[20].parts, strict=True):
        assert (part is None) == (own is None)
        same(None if part is None else vars(part), None if own is None else vars(own), None)


def same(found: Any, expected: Any, rows: int | None) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, mx.array):
        assert found.dtype == expected.dtype
        if rows is not None:
            found, expected = found[..., :rows, :], expected[..., :rows, :]
        a, b = (mx.contiguous(array).view(mx.uint8) for array in (found, expected))
        assert found.shape == expected.shape and mx.array_equal(a, b)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            same(found[name], expected[name], rows)
    elif isinstance(expected, (list, tuple)):
        for a, b in zip(found, expected, strict=True):
            same(a, b, rows)
    else:
        assert found == expected


def test_what_cannot_be_written_is_not(tmp_path: Path, endless: Any, notes: list[str]) -> None:
    model = fake("trims")
    turns = kept(tmp_path, model, notes)
    ask(turns, endless, prompt(1, 20))
    turns._last.cache[0].more = object()
    turns.close()
    assert names(tmp_path) == []
    assert notes == ["note: this model's conversations are not kept on the disk: KVCache.more is a object"]
    layer = CacheList(KVCache())
    layer.more = 1
    with pytest.raises(UnwritableError, match="more than its parts"):
        ContextToWrite(CachedContext([layer], STEP, [1]))


# -- nothing that differs is trusted -------------------------------------------------------------------------------


def io_file(data: bytes) -> Any:
    made = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    made.write(data)
    made.seek(0)
    return made


def written(context: CachedContext) -> bytes:
    to_write, file = ContextToWrite(context), io.BytesIO()
    to_write.write(file, 60)
    assert len(file.getvalue()) == to_write.nbytes
    return file.getvalue()


@pytest.fixture(scope="module")
def small_file() -> bytes:
    rotating, plain, state = RotatingKVCache(4), KVCache(), ArraysCache(1)
    for _ in range(9):
        for part in (rotating, plain):
            part.update_and_fetch(mx.random.normal((1, 1, 1, 2)), mx.random.normal((1, 1, 1, 2)))
    state[0] = mx.random.normal((1, 3))
    context = CachedContext([plain, CacheList(rotating, state)], STEP, list(range(9)), [4, 8], [], 9, True)
    context.snapshot()
    return written(context)


def read_whole(data: bytes) -> CachedContext:
    with io_file(data) as file:
        fresh = [KVCache(), CacheList(RotatingKVCache(4), ArraysCache(1))]
        return WrittenContext("x", file).read_into(fresh, file, 9, 9, MANY)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_byte_or_length_is_never_trusted(small_file: bytes, data: Any) -> None:
    kind = data.draw(st.sampled_from(["flip", "cut", "longer", "swap"]))
    at = data.draw(st.integers(0, len(small_file) - 1))
    changed = bytearray(small_file)
    if kind == "flip":
        changed[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del changed[at:]
    elif kind == "longer":
        changed += bytes(at + 1)
    else:
        other = data.draw(st.integers(0, len(small_file) - 1))
        changed[at], changed[other] = changed[other], changed[at]
        if changed == small_file:
            return
    with pytest.raises(ValueError, match=r"it|tensor"):
        read_whole(bytes(changed))


def test_the_unchanged_file_is_read(small_file: bytes) -> None:
    assert read_whole(small_file).tokens == list(range(9))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
        lambda data: (len(data) - 8).to_bytes(8, "little") + data[8:],
        lambda data: signed(data, b'"mlx_flash conversation 1"', b'"mlx_flash conversation 9"'),
        lambda data: signed(data, b'\\"step\\": 4', b'\\"step\\": 0'),
        lambda data: signed(data, b'\\"as_read\\": 9', b'\\"as_read\\":[]'),
        lambda data: signed(data, b'\\"stops\\": [4, 8]', b'\\"stops\\": [4,99]'),
        lambda data: signed(data, b'\\"stops\\": [4, 8]', b'\\"stops\\": 123456'),
        lambda data: signed(data, b'\\"array\\": 0', b'\\"array\\": 7'),
        lambda data: signed(data, b'\\"offset\\": {\\"value\\": 9}', b'\\"offset\\": {\\"value\\": 8}'),
        lambda data: signed(data, b'\\"keys\\"', b'\\"kezs\\"'),
        lambda data: signed(data, b'\\"tuple\\"', b'\\"tuqle\\"') if b"tuple" in data else data[:-1],
    ],
)
def test_a_hostile_description_with_a_right_checksum(change: Callable[[bytes], bytes], small_file: bytes) -> None:
    with pytest.raises(ValueError, match=r"it|description|attributes|tokens|holds"):
        read_whole(change(small_file))


def signed(data: bytes, old: bytes, new: bytes) -> bytes:
    """The file with a changed header, and the checksum that belongs to it."""
    size = 8 + int.from_bytes(data[:8], "little")
    assert old in data[:size] and len(old) == len(new)
    header = data[:size].replace(old, new)
    return header + data[size:-32] + hashlib.sha256(header).digest()


def test_a_damaged_file_is_removed_and_said_once(tmp_path: Path, endless: Any, notes: list[str]) -> None:
    model, first = fake("window"), prompt(1, 40)
    turns = kept(tmp_path, model, notes)
    made, _ = ask(turns, endless, first)
    turns.close()
    (path,) = (tmp_path / "conversations").glob("*/*.safetensors")
    data = path.read_bytes()
    again = [*first, *made, *prompt(2, 3)]
    expected = ask(ReusedPromptCache(fake("window", MANY)), endless, again)
    for changed in (data[:-1], data[:-40] + b"\1" + data[-39:], b"", b"\xff" * 100):
        path.write_bytes(changed)
        turns = kept(tmp_path, model, notes)
        assert ask(turns, endless, again) == expected and turns.reused == 0
        assert names(tmp_path) == [] and len(notes) == 1
        notes.clear()


@pytest.mark.parametrize("kind", ["symlink", "pipe", "writable", "folder"])
def test_what_others_could_have_made_is_not_read(kind: str, tmp_path: Path, endless: Any, notes: list[str]) -> None:
    model, first = fake("trims"), prompt(1, 40)
    turns = kept(tmp_path, model, notes)
    made, _ = ask(turns, endless, first)
    turns.close()
    (path,) = (tmp_path / "conversations").glob("*/*.safetensors")
    elsewhere = path.rename(tmp_path / "elsewhere")
    if kind == "symlink":
        path.symlink_to(elsewhere)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(elsewhere.read_bytes())
        path.chmod(0o666)
    turns = kept(tmp_path, model, notes)
    ask(turns, endless, [*first, *made, 5])
    assert turns.reused == 0 and elsewhere.exists() and len(notes) == 1
    turns.close()


def test_a_link_in_place_of_the_folder_is_not_followed(tmp_path: Path, endless: Any, notes: list[str]) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "conversations").symlink_to(tmp_path / "other")
    turns = kept(tmp_path, fake("trims"), notes)
    ask(turns, endless, prompt(1, 40))
    turns.close()
    assert list((tmp_path / "other").iterdir()) == [] and len(notes) == 1


def test_the_mode(tmp_path: Path, endless: Any, notes: list[str]) -> None:
    (tmp_path / "conversations").mkdir(mode=0o755)
    before = os.umask(0)
    try:
        turns = kept(tmp_path, fake("trims"), notes)
        ask(turns, endless, prompt(1, 40))
        turns.close()
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "conversations").rglob("*") if path.is_file()}
    folders = [tmp_path / "conversations", tmp_path / "conversations" / NAME]
    assert modes == {0o600} and {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}


def test_a_model_that_fails_with_a_file_removes_it(tmp_path: Path, endless: Any, notes: list[str]) -> None:
    model, first = fake("trims"), prompt(1, 40)
    turns = kept(tmp_path, model, notes)
    made, _ = ask(turns, endless, first)
    turns.close()
    turns = kept(tmp_path, model, notes)
    model.flash.verify_unchanged = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        ask(turns, endless, [*first, *made, 5])
    assert names(tmp_path) == []
