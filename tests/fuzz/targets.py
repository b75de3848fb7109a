"""The fuzzing targets. Each takes bytes and raises only for a defect; errors of this package are valid answers."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mutate import Mutator, flipped, json_text, safetensors  # type: ignore[import-not-found]  # found beside this file

from mlx_flash.convert.checkpoint import Checkpoint
from mlx_flash.convert.store_plan import Settings, StorePlan
from mlx_flash.errors import FlashError
from mlx_flash.flash import files
from mlx_flash.flash.safetensors_file import read_header
from mlx_flash.loading import load
from mlx_flash.loading.config import holds_mixture
from mlx_flash.loading.in_place_model import open_in_place
from mlx_flash.loading.model_types import activation_of, family_of
from mlx_flash.loading.plan import parse_memory
from mlx_flash.server.api_errors import ApiError
from mlx_flash.server.apis.openai_chat import ChatRequest
from mlx_flash.server.apis.openai_common import parse
from mlx_flash.server.apis.openai_completions import CompletionRequest
from mlx_flash.source.checkpoint_files import weight_files
from mlx_flash.text.generation import stream_generate
from mlx_flash.text.generation_config import GenerationConfig
from mlx_flash.text.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a file system in memory, if there is one


@functools.cache
def scratch() -> Path:
    """A folder of this process, which is removed at its end."""
    import atexit

    folder = tempfile.mkdtemp(prefix="fuzz-", dir=MEMORY)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@dataclass(frozen=True)
class Target:
    """seeds: the initial inputs. through_mlx: whether a run is slow, because it uses MLX or a tokenizer."""

    run: Callable[[bytes], None]
    mutate: Mutator
    seeds: Callable[[], list[bytes]]
    through_mlx: bool = False


# -- pure parsers --------------------------------------------------------------------------------------------


def header(data: bytes) -> None:
    path = scratch() / "header.safetensors"
    path.write_bytes(data)
    try:
        _, entries = read_header(path)
    except ValueError:
        return
    covered = sum(entry.end - entry.begin for entry in entries.values())
    assert covered == len(data) - 8 - int.from_bytes(data[:8], "little")


def manifest(data: bytes) -> None:
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(body := json.loads(data), dict):  # with a valid checksum
            body["checksum"] = files._digest(body)
            data = json.dumps(body).encode()
    folder = scratch()
    (folder / files.MANIFEST).write_bytes(data)
    try:
        found = files.parse_manifest(folder)
    except FlashError:
        return
    assert found.problem() is None and found.layout.problem() is None
    assert found.layout.file_bytes == found.files[found.neurons_file]["bytes"]


def index(data: bytes) -> None:
    names = {"model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"}
    try:
        found = weight_files(names, lambda _: data.decode(errors="replace"), "here")
    except FlashError:
        return
    assert set(found.names) <= names


def request(data: bytes) -> None:
    for kind in (ChatRequest, CompletionRequest):
        with contextlib.suppress(ApiError):
            asked: Any = parse(kind, data)
            asked.check()
            asked.question(asked.sampling(512, GenerationConfig()))


def memory(data: bytes) -> None:
    with contextlib.suppress(FlashError):
        assert parse_memory(data.decode(errors="replace")) >= 0


# -- through MLX, the zoo and tokenizers -----------------------------------------------------------------------


def tensors(data: bytes) -> None:
    """Headers that our reader accepts must be read by MLX with the same tensors."""
    path = scratch() / "tensors.safetensors"
    path.write_bytes(data)
    try:
        _, entries = read_header(path)
    except ValueError:
        return
    try:
        loaded: Any = mx.load(str(path))
        mx.eval(loaded)
    except RuntimeError:  # a type that MLX lacks
        return
    for name, entry in entries.items():
        assert tuple(loaded[name].shape) == entry.shape


def _folder(data: bytes, source: Path, name: str) -> Path:
    """A copy of `source` in which the file `name` holds `data`."""
    folder = scratch() / source.name
    if not folder.exists():
        shutil.copytree(source, folder)
    (folder / name).write_bytes(data)
    return folder


def config(data: bytes) -> None:
    folder = _folder(data, GOLDEN / "opt-pre", "config.json")
    with contextlib.suppress(FlashError):
        if holds_mixture(folder):
            return
        checkpoint = Checkpoint(folder)
        family = family_of(checkpoint.config, folder)
        StorePlan(checkpoint, family, activation_of(checkpoint.config, folder), Settings())


@functools.cache
def _mixture() -> Path:
    from mixtures import make_mixture  # type: ignore[import-not-found]

    path: Path = make_mixture(scratch() / "mixture-source", "qwen3_moe", "4 bits")
    return path


def mixture_config(data: bytes) -> None:
    folder = _folder(data, _mixture(), "config.json")
    with contextlib.suppress(FlashError):
        if holds_mixture(folder):
            open_in_place(folder)


@functools.cache
def _tokenizer() -> Path:
    from conftest import write_tokenizer  # type: ignore[import-not-found]

    folder = scratch() / "tokenizer-source"
    folder.mkdir()
    write_tokenizer(folder)
    return folder


def _use_tokenizer(folder: Path) -> None:
    with contextlib.suppress(FlashError):
        tokenizer = load_tokenizer(folder)
        from mlx_flash.text.generation import encode_prompt

        ids = encode_prompt(tokenizer, "It was a dark night 𐍈\n\t")
        detokenizer = tokenizer.detokenizer
        for token in [*ids[:8], 0, 5, 10**6]:
            detokenizer.add_token(token)
        detokenizer.finalize()


def tokenizer(data: bytes) -> None:
    _use_tokenizer(_folder(data, _tokenizer(), "tokenizer.json"))


def tokenizer_config(data: bytes) -> None:
    _use_tokenizer(_folder(data, _tokenizer(), "tokenizer_config.json"))


@functools.cache
def _store() -> Path:
    from conftest import make_tiny  # type: ignore[import-not-found]
    from tiny import make_checkpoint  # type: ignore[import-not-found]

    folder = scratch() / "store-source"
    made: Path = make_tiny(folder, make_checkpoint(folder / "checkpoint", neurons=64), 96).store
    return made


def store(data: bytes) -> None:
    """Loads a whole store with a valid checksum in its manifest, and generates two tokens."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(body := json.loads(data), dict):
            body["checksum"] = files._digest(body)
            data = json.dumps(body).encode()
    folder = _folder(data, _store(), files.MANIFEST)
    with contextlib.suppress(FlashError):
        model, words = load.load(folder, memory="2GB", context=16, threads=2)
        try:
            for _ in stream_generate(model, words, [5, 6, 7], max_tokens=2):
                pass
        finally:
            model.flash.close()


def _headers() -> list[bytes]:
    """The headers of a checkpoint and of a file with two tensors."""
    entries = {
        "__metadata__": {"format": "mlx"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b.weight": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
    }
    text = json.dumps(entries).encode()
    return [_goldens("model.safetensors")[0], len(text).to_bytes(8, "little") + text + bytes(26)]


def _manifests() -> list[bytes]:
    """A store's whole manifest, and a short one, which a fuzzer processes three times as fast."""
    whole = (_store() / files.MANIFEST).read_bytes()
    short = json.loads(whole)
    kept = short["default_predictor"] = "lowrank"
    report = short["predictors"][kept]
    for name in ("recall", "caught", "predicted", "threshold"):
        rows = report["table"][name]
        report["table"][name] = rows[:2] if name == "recall" else [row[:2] for row in rows]
    report["target"] = report["table"]["recall"][0]
    short["predictors"] = {kept: report}
    resident = short["files"]["model.safetensors"]
    resident["crc32"] = dict(list(resident["crc32"].items())[:2])
    del short["files"]["predictor-shadow.safetensors"], short["files"]["tokenizer.json"]
    return [whole, json.dumps(short).encode()]


def _bytes_of(*paths: Path) -> list[bytes]:
    return [path.read_bytes() for path in paths]


def _goldens(name: str) -> list[bytes]:
    return _bytes_of(*sorted(GOLDEN.glob(f"*/{name}")))


REQUESTS = (
    b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "stream": true, "temperature": 0.5}',
    b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "logit_bias": {"5": 1}}',
    b'{"prompt": [1, 2, 3], "max_tokens": 3, "logprobs": 2, "seed": 1, "top_p": 0.9, "frequency_penalty": 1}',
)
INDEX = b'{"metadata": {"total_size": 9}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'

TARGETS: dict[str, Target] = {
    "header": Target(header, safetensors, _headers),
    "manifest": Target(manifest, json_text, _manifests),
    "index": Target(index, json_text, lambda: [INDEX]),
    "request": Target(request, json_text, lambda: list(REQUESTS)),
    "memory": Target(memory, flipped, lambda: [b"6GB", b"500 MiB", b"1.5g"]),
    "tensors": Target(tensors, safetensors, _headers, through_mlx=True),
    "config": Target(config, json_text, lambda: _goldens("config.json"), through_mlx=True),
    "mixture-config": Target(
        mixture_config, json_text, lambda: _bytes_of(_mixture() / "config.json"), through_mlx=True
    ),
    "tokenizer": Target(tokenizer, json_text, lambda: _bytes_of(_tokenizer() / "tokenizer.json"), through_mlx=True),
    "tokenizer-config": Target(
        tokenizer_config, json_text, lambda: _bytes_of(_tokenizer() / "tokenizer_config.json"), through_mlx=True
    ),
    "store": Target(store, json_text, lambda: _bytes_of(_store() / files.MANIFEST), through_mlx=True),
}
