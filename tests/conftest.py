"""Fixtures: tiny checkpoints with a tokenizer, stores converted once per session, and copies that a test may change."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import shutil
import signal
import string
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from children_setup import ON_CPU, prepare_children  # type: ignore[import-not-found]  # beside this file, first of all
from golden_models import GOLDEN, load  # type: ignore[import-not-found]  # found beside this file
from hypothesis import settings
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_tasks import set_right  # type: ignore[import-not-found]
from tiny import make_checkpoint, make_gated_checkpoint  # type: ignore[import-not-found]  # found beside this file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import mlx_flash
from mlx_flash.cli.run import run_command
from mlx_flash.convert.conversion import Settings, convert
from mlx_flash.flash.files import ALIGNMENT, MANIFEST, Manifest, NeuronLayout, parse_manifest, read_manifest, round_up
from mlx_flash.flash.pressure import Level, Pressure
from mlx_flash.flash.safetensors_file import sha256_of, tensor_checksums
from mlx_flash.layers.quantised import companions
from mlx_flash.loading import load as loading
from mlx_flash.loading import slot_keeper, streaming_needs
from mlx_flash.loading import store as store_module
from mlx_flash.loading.model_types import family_of, model_classes
from mlx_flash.source.resolve import demo_folder
from mlx_flash.text.tokenizer import load_tokenizer

prepare_children()


WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")  # gw0, gw1, ... with `pytest -n`
WORKER_TMP = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Gives the suite its own cache folder, which later runs reuse, so that the demo model is converted only once.

    Workers share nothing, not even the temporary folder: MLX keeps there what g++ compiled for it, and a process may
    load a library that another is still writing.
    """
    cache = getattr(config, "cache", None)  # missing with `-p no:cacheprovider`
    os.environ["MLX_FLASH_CACHE"] = str(cache.mkdir(f"mlx_flash{WORKER}")) if cache else tempfile.mkdtemp()
    # What a server of an earlier run read would be in a prompt cache now.
    shutil.rmtree(Path(os.environ["MLX_FLASH_CACHE"]) / "conversations", ignore_errors=True)
    if WORKER:
        config.stash[WORKER_TMP] = os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(
            prefix=f"mlx_flash-{WORKER}-"
        )


def pytest_unconfigure(config: pytest.Config) -> None:
    if folder := config.stash.get(WORKER_TMP, None):
        shutil.rmtree(folder, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if ON_CPU and item.get_closest_marker("metal"):
            item.add_marker(pytest.mark.skip(reason="MLX_FLASH_TEST_DEVICE=cpu"))


def pytest_runtest_logfinish() -> None:
    set_right()


@pytest.fixture(autouse=True)
def steady_machine() -> Iterator[None]:
    """Lets all plans of a test count the same process, and models keep their slots.

    What earlier tests left behind and what else this machine does must not matter. A test's own `monkeypatch.undo`
    leaves these as they are.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(streaming_needs, "current_memory_bytes", lambda: 200_000_000)
        patched.setattr(slot_keeper, "memory_pressure", lambda: Pressure(Level.NORMAL))
        yield


# A shell starts background jobs with Ctrl-C ignored, and children inherit that. Tests of Ctrl-C need the default.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The suite tries the same examples every time. For random ones: `pytest --hypothesis-profile=search`.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None, print_blob=True)
settings.load_profile("suite")

NOT_STREAMED = ("falcon-11b-like", "persimmon-no-qk-norm")  # only compared as whole models
GOLDEN_VARIANTS = tuple(sorted({path.parent.name for path in GOLDEN.glob("*/golden.npz")} - {*NOT_STREAMED}))
DTYPES = ("float32", "float16", "bfloat16")
QUANTISED = ("4 bits", "gated 8 bits")
PREDICTORS = ("none", "exact", "lowrank", "shadow")
PIECES = 3  # a layer of these stores has 3 full pieces and a shorter one
EOS = 0


def write_tokenizer(folder: Path, vocab: int = 96) -> None:
    """Writes a byte-level tokenizer with one token per character. Like OPT's, it begins every text with </s>."""
    characters = (string.ascii_letters + "Ġ" + string.digits + string.punctuation)[: vocab - 1]
    tokenizer = Tokenizer(models.BPE(vocab={"</s>": EOS, **{c: i + 1 for i, c in enumerate(characters)}}, merges=[]))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", EOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "</s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def change_manifest(folder: Path, **changes: Any) -> None:
    """Rewrites the store's manifest with other fields, and with the sizes and checksums of the present files."""
    manifest = replace(parse_manifest(folder), **changes)
    sizes = {name: (folder / name).stat().st_size for name in manifest.files if (folder / name).exists()}
    entries = {name: {**manifest.files[name], "bytes": size} for name, size in sizes.items()}
    for name, entry in entries.items():
        if "sha256" in entry:
            entry["sha256"] = sha256_of(folder / name)
        with contextlib.suppress(ValueError):  # a header that was damaged on purpose
            if "crc32" in entry:
                entry["crc32"] = tensor_checksums(folder / name)
    (folder / MANIFEST).write_text(replace(manifest, files=entries).to_json())


@dataclass(frozen=True)
class Tiny:
    """A checkpoint and the store made from it."""

    checkpoint: Path
    store: Path

    @functools.cached_property
    def manifest(self) -> Manifest:
        return read_manifest(self.store)

    @functools.cached_property
    def dense(self) -> Any:
        """The plain model in float32, with the store's numbers after quantisation."""
        config = json.loads((self.checkpoint / "config.json").read_text())
        model_class, args_class = model_classes(config)
        model = model_class(args_class.from_dict(config))
        weights: Any = mx.load(str(self.checkpoint / "model.safetensors"))
        weights = model.sanitize({name: weight.astype(mx.float32) for name, weight in weights.items()})
        if self.manifest.layout.quantised:
            for layer, rows in enumerate(self.rows):
                *first, down = family_of(config, self.checkpoint).weights(layer)
                weights |= {name: mx.array(part) for name, part in zip(first, rows, strict=False)}
                weights[down] = mx.array(rows[-1].T)
        stored: Any = mx.load(str(self.store / Manifest.resident_file))
        for name in [name for name in stored if stored[name].dtype == mx.uint32]:
            scales, biases = (np.array(stored[own].astype(mx.float32)) for own in companions(name))
            weights[name] = mx.array(unpacked(np.array(stored[name]), scales, biases, self.manifest.resident_bits))
        model.load_weights(list(weights.items()), strict=True)
        return model

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """The store's contents, read without the engine: float32 (layers, parts, neurons, width)."""
        layout = self.manifest.layout
        used = layout.neurons_per_block * layout.bundle_bytes
        raw = np.fromfile(self.store / Manifest.neurons_file, np.uint8).reshape(layout.layers, layout.layer_bytes)
        blocks = raw[:, : layout.blocks * layout.block_bytes].reshape(layout.layers, layout.blocks, -1)[:, :, :used]
        rows = blocks.reshape(layout.layers, layout.blocks, len(layout.parts), -1, layout.row_bytes)
        rows = rows.transpose(0, 2, 1, 3, 4).reshape(layout.layers, len(layout.parts), -1, layout.row_bytes)
        rows = np.ascontiguousarray(rows[:, :, : layout.neurons])
        dtype = getattr(mx, layout.dtype)
        if not layout.quantised:
            return np.array(mx.array(rows).view(dtype).astype(mx.float32))
        words = layout.width * layout.bits // 8
        numbers = np.array(mx.array(rows[..., words:]).view(dtype).astype(mx.float32))
        packed = np.ascontiguousarray(rows[..., :words]).view(np.uint32)
        scales, biases = np.split(numbers, 2, axis=-1)
        return unpacked(packed, scales, biases, layout.bits)


def unpacked(packed: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> np.ndarray:
    """Inverts MLX's affine quantisation, lowest bits of a word first. (..., m) -> float32 (..., m * 32 / bits)"""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    numbers = (packed[..., None] >> shifts & np.uint32(2**bits - 1)).astype(np.float32)
    grouped = numbers.reshape(*scales.shape, -1)
    return (grouped * scales[..., None] + biases[..., None]).reshape(*packed.shape[:-1], -1)


def make_tiny(folder: Path, checkpoint: Path, vocab: int, **settings: Any) -> Tiny:
    """Converts a checkpoint with small pieces, and makes every layer select neurons."""
    write_tokenizer(checkpoint, vocab)
    # Random matrices have full rank. A low-rank predictor within the default memory would choose every neuron.
    convert(checkpoint, folder / "store", Settings(calibration_tokens=1024, predictor_memory=1 << 20, **settings))
    layout = read_manifest(folder / "store").layout
    layout = replace(layout, piece_neurons=layout.blocks // PIECES * layout.neurons_per_block)
    change_manifest(folder / "store", layout=layout, all_neurons_layers=())
    return Tiny(checkpoint, folder / "store")


def several_in_a_block(plan: Callable[..., NeuronLayout]) -> Callable[..., NeuronLayout]:
    """Returns a plan that puts 16 neurons into a block, which the format allows."""

    def planned(*arguments: Any) -> NeuronLayout:
        layout = plan(*arguments)
        block_bytes = round_up(16 * layout.bundle_bytes, ALIGNMENT)
        return replace(layout, neurons_per_block=16, block_bytes=block_bytes, piece_neurons=16)

    return planned


@pytest.fixture
def dark_night(tmp_path: Path) -> Path:
    """A file of plain text."""
    path = tmp_path / "text.txt"
    path.write_text("It was a dark night, and the old dog slept beside the fire. " * 8)
    return path


@pytest.fixture(scope="module")
def one_processor() -> Iterator[None]:
    """Keeps all threads on one processor (Linux), where a woken thread does not interrupt the one that woke it.

    MLX's CPU backend hands every operation to a thread of its own. Waking that on another processor takes a third of
    the time of small models. Use this in files that compute, but not in files about threads.
    """
    if sys.platform != "linux":
        yield
        return
    everywhere = os.sched_getaffinity(0)

    def move(processors: set[int], policy: int) -> None:
        for thread in map(int, os.listdir("/proc/self/task")):
            with contextlib.suppress(OSError):  # the thread has ended, or the system does not allow it
                os.sched_setaffinity(thread, processors)
                os.sched_setscheduler(thread, policy, os.sched_param(0))

    move({sorted(everywhere)[os.getpid() % len(everywhere)]}, os.SCHED_BATCH)
    yield
    move(everywhere, os.SCHED_OTHER)


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """Makes tiny models by name.

    A dtype gives a random model that does not repeat itself. The name of a golden checkpoint gives that checkpoint. A
    name in QUANTISED gives blocks of one neuron without padding, or padded blocks of several neurons.
    """

    @functools.cache
    def make(name: str) -> Tiny:
        folder = tmp_path_factory.mktemp(name)
        checkpoint = folder / "checkpoint"
        if name in GOLDEN_VARIANTS:
            shutil.copytree(GOLDEN / name, checkpoint)
            return make_tiny(folder, checkpoint, 64)
        if name == "4 bits":
            make_checkpoint(checkpoint, hidden=128, neurons=384, dtype=mx.float16)
            return make_tiny(folder, checkpoint, 96, bits=4, resident_bits=4)
        if name == "gated 8 bits":
            make_gated_checkpoint(checkpoint)
            with patch.object(NeuronLayout, "plan", several_in_a_block(NeuronLayout.plan)):
                return make_tiny(folder, checkpoint, 96, bits=8, resident_bits=8, group_size=32)
        dtype = getattr(mx, name)
        make_checkpoint(checkpoint, neurons=512, dtype=dtype, tie_word_embeddings=False)
        weights: Any = mx.load(str(checkpoint / "model.safetensors"))
        head = np.random.default_rng(1).standard_normal((96, 64), np.float32)
        # With tied embeddings the model would repeat one token for ever.
        weights = {**weights, "lm_head.weight": mx.array(head).astype(dtype)}
        mx.eval(weights)
        mx.save_safetensors(str(checkpoint / "model.safetensors"), weights)
        return make_tiny(folder, checkpoint, 96)

    return make


@pytest.fixture(scope="session")
def tiny(tiny_of: Callable[[str], Tiny]) -> Tiny:
    return tiny_of("float32")


@pytest.fixture(scope="session")
def store(tiny: Tiny) -> Path:
    return tiny.store


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a model with the demo's vocabulary and context that takes a tenth of its time per token.

    The model generates 64 words, none with certainty, and no other tokens, not even the end of a text.
    """
    folder = tmp_path_factory.mktemp("speaker")
    checkpoint = make_checkpoint(folder / "checkpoint", vocab=4096, positions=512, tie_word_embeddings=False)
    weights: Any = mx.load(str(checkpoint / "model.safetensors"))
    norm = "model.decoder.final_layer_norm"
    weights[f"{norm}.weight"][0], weights[f"{norm}.bias"][0] = 0, 20  # the head's first input is always 20
    head = np.zeros((4096, 64), np.float32)
    head[:, 0] = -1
    head[300:364] = np.random.default_rng(1).standard_normal((64, 64), np.float32) / 5
    head[300:364, 0] = 0
    weights["lm_head.weight"] = mx.array(head)
    mx.eval(weights)
    mx.save_safetensors(str(checkpoint / "model.safetensors"), weights)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_folder() / name, checkpoint)
    convert(checkpoint, folder / "store", Settings(calibration_tokens=256, predictor_memory=1 << 20))
    return folder / "store"


@pytest.fixture(scope="session")
def load_speaker(speaker: Path) -> Callable[[], tuple[Any, Any]]:
    """Loads the speaker's model and tokenizer."""
    return functools.partial(loading.load, speaker, prompt_cache="16MB")


@pytest.fixture
def own_store(store: Path, tmp_path: Path) -> Path:
    """A copy of the store that the test may change."""
    return Path(shutil.copytree(store, tmp_path / "store"))


@pytest.fixture(scope="session")
def tokenizer(store: Path) -> Any:
    return load_tokenizer(store)


@pytest.fixture(scope="session")
def endless(tokenizer: Any) -> Any:
    """The tokenizer without a token that ends the text."""
    wrapper = TokenizerWrapper(tokenizer._tokenizer, type(tokenizer.detokenizer))
    wrapper._eos_token_ids = {-1}
    return wrapper


@pytest.fixture(scope="session")
def needs() -> dict[Any, Any]:
    """A cache of the models' memory needs for `open_model`."""
    return {}


@pytest.fixture
def open_model(needs: dict[Any, Any]) -> Iterator[Callable[..., Any]]:
    """Loads the model of a store without its tokenizer, with exactly `slots` blocks per layer (None: all)."""
    opened: list[Any] = []

    def open_store(store: Path, slots: int | None = None, predictor: str = "auto", **options: Any) -> Any:
        real = store_module.make_plan

        def plan(*arguments: Any, **keywords: Any) -> Any:
            made = real(*arguments, **keywords)
            return replace(made, slots=(made.units.per_layer if slots is None else slots,) * made.units.layers)

        def needs_of(model: Any, layers: Any, context: int, dtype: Any, chunk: int) -> Any:
            """Caches the needs. The slots are fixed here, and tracing a model's graph takes longer than loading it."""
            key = (store, (store / MANIFEST).stat().st_mtime_ns, predictor, context, dtype, chunk)
            if key not in needs:
                needs[key] = real_needs_of(model, layers, context, dtype, chunk=chunk)
            return needs[key]

        real_needs_of = store_module.needs_of
        with (
            patch.object(store_module, "make_plan", plan),
            patch.object(store_module, "needs_of", needs_of),
            patch.object(store_module, "load_tokenizer"),
        ):
            model, _ = loading.load(store, predictor=predictor, **options)
        opened.append(model)
        return model

    yield open_store
    for model in opened:
        model.flash.close()


@pytest.fixture
def model(variant: str) -> Any:
    return load(variant)


@pytest.fixture
def golden(variant: str) -> dict[str, mx.array]:
    with np.load(GOLDEN / variant / "golden.npz") as arrays:
        return {name: mx.array(arrays[name]) for name in arrays.files}


@pytest.fixture(scope="session")
def generate_command() -> ModuleType:
    """The file generate.py as a module of another name. As mlx_flash.generate it would hide the function."""
    path = Path(mlx_flash.__file__).parent / "generate.py"
    spec = importlib.util.spec_from_file_location("mlx_flash.generate_command", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_generate(
    generate_command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process. Returns (exit code, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["generate", *arguments])
        with pytest.raises(SystemExit) as caught:
            run_command(generate_command.make_parser(), generate_command.main)
        assert isinstance(caught.value.code, int)
        return caught.value.code, *capsys.readouterr()

    return run
