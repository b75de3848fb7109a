"""Mixtures of experts against mlx-lm with everything in memory: the same bits with every number of slots."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mixtures import (  # type: ignore[import-not-found]
    FAMILIES,
    QUANTISATIONS,
    VOCABULARY,
    assert_same,
    make_mixture,
    open_streamed,
    to_bfloat16,
)
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import load_model
from slow_cases import others, slow  # type: ignore[import-not-found]

from mlx_flash.errors import CheckpointError, ReadError, UsageError
from mlx_flash.flash.in_place import InPlaceFiles
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.units import PrefetchRecord
from mlx_flash.layers import experts as layer_module
from mlx_flash.layers.expert_products import SORTED_FROM, Widened
from mlx_flash.layers.experts import StreamedExperts
from mlx_flash.layers.lookahead import LookAhead
from mlx_flash.loading import load
from mlx_flash.loading.in_place_loading import plan_in_place, streamed_layers
from mlx_flash.loading.in_place_model import open_in_place
from mlx_flash.loading.memory_needs import needs_of
from mlx_flash.loading.options import LoadOptions
from mlx_flash.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_processor")

PROMPT = [5, 17, 80, 3, 44, 61, 9, 9, 30, 72, 1, 55, 8, 90, 31, 2, 77, 64, 12, 40, 33, 21, 7, 68, 50]


@pytest.fixture(scope="module")
def mixture_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @functools.cache
    def make(family: str, quantisation: str = "plain", shards: int = 1) -> Path:
        return make_mixture(tmp_path_factory.mktemp(family), family, quantisation, shards)

    return make


@pytest.fixture
def stream() -> Iterator[Callable[..., tuple[Any, InPlaceFiles]]]:
    """(model, streamer) of a checkpoint with so many slots per layer."""
    streamers: list[InPlaceFiles] = []

    def open_one(folder: Path, slots: int, **options: Any) -> tuple[Any, InPlaceFiles]:
        model, streamer = open_streamed(folder, slots, **options)
        streamers.append(streamer)
        return model, streamer

    yield open_one
    for streamer in streamers:
        streamer.close()


def everything(model: Any) -> list[np.ndarray]:
    """Logits of calls of every form: a prompt, single tokens, a few tokens at once, and a batch without a cache."""
    cache = make_prompt_cache(model)
    calls = [PROMPT, [4], [9], [77, 31], [6], [12, 4, 50], [9]]
    results = [np.array(model(mx.array([call]), cache=cache).astype(mx.float32)) for call in calls]
    batch = mx.array([PROMPT[:9], PROMPT[9:18]])
    return [*results, np.array(model(batch).astype(mx.float32))]


@functools.cache
def reference(folder: Path) -> list[np.ndarray]:
    return everything(load_model(folder)[0])


@pytest.mark.parametrize(
    ("family", "quantisation"),
    others(
        [(family, quantisation) for family in FAMILIES for quantisation in ("plain", "4 bits")],
        [*((family, "4 bits") for family in FAMILIES), ("qwen3_moe", "plain"), ("mixtral", "plain")],
    ),
)
def test_every_family_has_the_bits_of_mlx_lm(
    mixture_of: Callable[..., Path], stream: Callable[..., Any], family: str, quantisation: str
) -> None:
    """Tests every family with every number of slots, and one family with every number in both quantisations."""
    folder = mixture_of(family, quantisation)
    expected = reference(folder)
    numbers = (1, 2, 5, 12) if family == "qwen3_moe" else (1, 5) if quantisation == "plain" else (2, 12)
    for slots in numbers:
        model, streamer = stream(folder, slots)
        assert_same(everything(model), expected, slots)
        read = streamer.counters.bytes
        assert read > 0 and streamer.counters.misses > 0
        if slots == 12 or len(numbers) == 4:
            assert_same(everything(model), expected, (slots, "again"))
        if slots == 12:
            assert streamer.counters.bytes == read, "everything is resident by now"


@pytest.mark.parametrize("quantisation", [q for q in QUANTISATIONS if q not in ("plain", "4 bits")])
def test_every_quantisation(mixture_of: Callable[..., Path], stream: Callable[..., Any], quantisation: str) -> None:
    folder = mixture_of("qwen3_moe", quantisation)
    for slots in (3, 7, 12):
        model, _ = stream(folder, slots)
        assert_same(everything(model), reference(folder), slots)


def test_shards(mixture_of: Callable[..., Path], stream: Callable[..., Any]) -> None:
    folder = mixture_of("qwen3_moe", "4 bits", 3)
    assert_same(reference(folder), reference(mixture_of("qwen3_moe", "4 bits")), "the same weights")
    model, _ = stream(folder, 5)
    assert_same(everything(model), reference(folder), "sharded")


def test_16_bits_are_widened_on_the_cpu_backend(
    mixture_of: Callable[..., Path], stream: Callable[..., Any], tmp_path: Path
) -> None:
    """mlx-lm cannot run these on the CPU, so the reference has the same numbers in float32."""
    folder = make_mixture(tmp_path / "bfloat16", "qwen3_moe")
    to_bfloat16(folder, only="switch_mlp")
    same = tmp_path / "float32"
    shutil.copytree(folder, same)
    rounded: Any = mx.load(str(folder / "model.safetensors"))
    mx.save_safetensors(str(same / "model.safetensors"), {n: a.astype(mx.float32) for n, a in rounded.items()})
    for slots in (2, 12):
        assert_same(everything(stream(folder, slots)[0]), reference(same), slots)


def test_what_still_reads_a_slot_is_evaluated_before_it_is_written(
    mixture_of: Callable[..., Path], stream: Callable[..., Any]
) -> None:
    model, _ = stream(mixture_of("qwen3_moe"), 1)
    experts = model.layers[0].mlp.switch_mlp.units
    pool = next(iter(experts.pools.values()))

    def bring(expert: int) -> np.ndarray:
        assert [group.tolist() for group in experts.use(np.array([expert]))] == [[expert]]
        return np.array(pool[0] * 1)

    second, first = bring(1), bring(0)
    lazy = pool[0] * 1
    experts.guard(lazy)
    assert np.array_equal(bring(1), second) and not np.array_equal(first, second)
    assert np.array_equal(np.array(lazy), first)


def test_a_failed_read_is_an_error_and_the_next_call_is_right(
    mixture_of: Callable[..., Path], stream: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mixture_of("qwen3_moe", "4 bits")
    model, streamer = stream(folder, 5)
    everything(model)
    wait = Reader.wait
    for number in (0, 1, 7):
        waits = iter(range(1000))

        def failing(reader: Reader, ticket: Any, waits: Any = waits, number: int = number) -> Any:
            report = wait(reader, ticket)
            if next(waits) == number:
                raise ReadError("injected")
            return report

        monkeypatch.setattr(Reader, "wait", failing)
        with pytest.raises(ReadError, match="injected"):
            everything(model)
        monkeypatch.undo()
        assert not streamer.loading and not streamer.reader.outstanding
        assert_same(everything(model), reference(folder), number)


@pytest.fixture(scope="module")
def chosen(mixture_of: Callable[..., Path]) -> list[np.ndarray]:
    """The experts of each call of qwen3_moe's second layer, except for calls with sorted pairs."""
    model, streamer = open_streamed(mixture_of("qwen3_moe", "4 bits"), 12)
    call = StreamedExperts.__call__
    found: list[np.ndarray] = []

    def noting(self: StreamedExperts, x: mx.array, indices: mx.array) -> mx.array:
        if self.ahead is None and indices.size < SORTED_FROM:
            found.append(np.array(indices))
        return call(self, x, indices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamedExperts, "__call__", noting)
        everything(model)
    streamer.close()
    return found


# All pairs of slots, guess and look-ahead: the room, the guessed experts, and how many of them are read.
@pytest.mark.parametrize(
    ("slots", "guess", "ahead"),
    [
        (slots, guess, (0.25, 3)[(i + j) % 2])
        for i, slots in enumerate([2, 5, 8])
        for j, guess in enumerate(["router's", "right", "wrong", "random", "nothing"])
    ],
)
def test_a_guess_never_changes_the_text(
    mixture_of: Callable[..., Path],
    stream: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    chosen: list[np.ndarray],
    slots: int,
    guess: str,
    ahead: float,
) -> None:
    folder = mixture_of("qwen3_moe", "4 bits")
    router, rng = LookAhead.guess, np.random.default_rng(0)
    following = itertools.cycle(chosen)

    def guessed(self: LookAhead, x: mx.array) -> mx.array | None:
        ids = next(following)
        if (found := router(self, x)) is None:
            assert self.units.prefetched.mostly_unused
            return None
        assert found.shape == (*x.shape[:-1], 12)
        needed = (np.arange(12) == ids[..., None]).any(-2).astype(np.float32)
        noise = rng.random(found.shape, np.float32)
        made = {"right": needed, "wrong": -needed, "random": noise}
        return None if guess == "nothing" else mx.array(made[guess]) if guess in made else found

    monkeypatch.setattr(LookAhead, "guess", guessed)
    monkeypatch.setattr(layer_module, "AHEAD", ahead)
    model, streamer = stream(folder, slots)
    for _ in range(2):
        assert_same(everything(model), reference(folder), guess)
    counters = streamer.counters
    assert (counters.prefetched_used + counters.prefetched_unused > 0) == (guess != "nothing")
    assert counters.prefetched_used > 0 or guess != "right"
    assert counters.prefetched_unused == 0 or guess != "right"
    assert counters.prefetched_unused > 0 or guess != "wrong"
    assert counters.prefetched_used <= counters.misses and not streamer.loading


def test_a_guess_that_cannot_be_read_or_is_left_behind(
    mixture_of: Callable[..., Path], stream: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mixture_of("qwen3_moe", "4 bits")
    monkeypatch.setattr(PrefetchRecord, "mostly_unused", False)  # however wrong the guesses are
    model, streamer = stream(folder, 5)
    first, second = model_layers = [layer.mlp.switch_mlp for layer in model.layers]
    prefetch, wait = LookAhead.prefetch, Reader.wait
    failed: list[Any] = []

    def left(self: LookAhead, guess: mx.array, needed: np.ndarray) -> None:
        prefetch(self, guess, needed)
        if self.units.pending is not None:
            raise KeyboardInterrupt

    def failing(reader: Reader, ticket: Any) -> Any:
        report = wait(reader, ticket)
        if first.units.pending is None and ticket in second.units.pending.tickets and not failed:
            failed.append(ticket)
            raise ReadError("injected")
        return report

    assert all(isinstance(layer, StreamedExperts) for layer in model_layers)
    with monkeypatch.context() as patch:
        patch.setattr(LookAhead, "prefetch", left)
        with pytest.raises(KeyboardInterrupt):
            everything(model)
    assert second.units.pending is not None  # still being read; the next call completes it
    assert_same(everything(model), reference(folder), "left behind")
    with monkeypatch.context() as patch:
        then_fails = lambda self, *_: prefetch(self, *_) or patch.setattr(Reader, "wait", failing)  # noqa: E731
        patch.setattr(LookAhead, "prefetch", then_fails)
        with pytest.raises(ReadError, match="injected"):
            everything(model)
    assert not streamer.loading and not streamer.reader.outstanding and second.units.pending is None
    assert_same(everything(model), reference(folder), "failed")


def test_an_interrupt_when_reads_have_just_landed(
    mixture_of: Callable[..., Path], stream: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(list[Any]):
        def remove(self, value: Any) -> None:
            super().remove(value)
            raise KeyboardInterrupt

    folder = mixture_of("qwen3_moe", "4 bits")
    model, streamer = stream(folder, 4)
    with monkeypatch.context() as patch:
        patch.setattr(streamer, "loading", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            everything(model)
    assert_same(everything(model), reference(folder), "interrupted")


def test_what_is_missing_joins_a_guess_under_way(mixture_of: Callable[..., Path], stream: Callable[..., Any]) -> None:
    model, streamer = stream(mixture_of("qwen3_moe", "4 bits"), 4)
    experts, counters = model.layers[1].mlp.switch_mlp.units, streamer.counters

    def has(ids: list[int]) -> bool:
        slots = experts.cache.slot_of[ids]
        found = [np.array(experts.pools["up_proj.weight"][int(slot)]) for slot in slots if slot >= 0]
        weights: Any = load_model(mixture_of("qwen3_moe", "4 bits"))[0].layers[1].mlp.switch_mlp.up_proj.weight
        return len(found) == len(ids) and all(np.array_equal(a, weights[i]) for a, i in zip(found, ids, strict=True))

    list(experts.use(np.array([0, 1])))
    experts.prefetch(np.array([0, 7, 8]))  # 0 is present and stays
    call = experts.use(np.array([0, 7, 9]))
    assert next(call).tolist() == [0]
    assert experts.pending is not None, "nothing waits for what is here"
    assert sorted(experts.pending.units) == [7, 8, 9] and len({*experts.pending.slots}) == 3
    assert next(call).tolist() == [7, 9]
    assert has([0, 7, 8, 9]) and (counters.prefetched_used, counters.prefetched_unused) == (1, 1)
    assert (counters.hits, counters.misses) == (1, 4)
    experts.prefetch(np.array([2, 3]))  # the next four leave no room for an expert that is not needed
    list(experts.use(np.array([4, 5, 6, 7])))
    assert (counters.prefetched_used, counters.prefetched_unused) == (1, 3)
    assert has([4, 5, 6, 7]) and not streamer.loading


def test_a_guess_is_made_only_where_it_pays(mixture_of: Callable[..., Path], stream: Callable[..., Any]) -> None:
    model, streamer = stream(mixture_of("qwen3_moe", "4 bits"), 5)
    streamer.look_ahead = False
    everything(model)
    assert streamer.counters.prefetched_used == streamer.counters.prefetched_unused == 0
    streamer.look_ahead = True
    everything(model)
    assert streamer.counters.prefetched_used > 0


@pytest.mark.parametrize("slots", [1, slow(4), slow(7)])
def test_functions_of_mlx_lm(mixture_of: Callable[..., Path], stream: Callable[..., Any], slots: int) -> None:
    """These begin a token before the last one is known, leave graphs unevaluated, and drop guessed tokens."""
    folder = mixture_of("qwen3_moe", "4 bits")
    write_tokenizer(folder, VOCABULARY)
    model, draft = stream(folder, slots)[0], stream(folder, 3)[0]
    found, expected = functions_of_mlx_lm(folder, model, draft), plain_functions_of_mlx_lm(folder)
    assert found.keys() == expected.keys() and len(expected["in turn"]) > 3
    for name, result in expected.items():
        assert found[name] == result, name


def functions_of_mlx_lm(folder: Path, model: Any, draft: Any) -> dict[str, Any]:
    tokenizer = load_tokenizer(folder)

    def tokens(prompt: list[int] = PROMPT, **options: Any) -> Iterator[int]:
        return (r.token for r in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=12, **options))

    prompts = [PROMPT, PROMPT[3:9], PROMPT[11:]]
    return {
        **{f"step {step}": list(tokens(prefill_step_size=step)) for step in (4, 512)},
        "in turn": list(zip(tokens(), tokens(PROMPT[9:]), strict=False)),
        "batch": mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=8).texts,
        "draft": list(tokens(draft_model=draft)),
        "lazy": [np.array(logits).tolist() for logits in [model(mx.array([prompt])) for prompt in prompts]],
    }


@functools.cache
def plain_functions_of_mlx_lm(folder: Path) -> dict[str, Any]:
    model = load_model(folder)[0]
    return functions_of_mlx_lm(folder, model, model)


def test_no_more_than_one_layers_output_is_kept(mixture_of: Callable[..., Path], stream: Callable[..., Any]) -> None:
    """A chunk's outputs of all layers would exceed the plan."""
    model, streamer = stream(mixture_of("qwen3_moe"), 11)
    for call in (PROMPT, *([token] for token in PROMPT)):
        mx.eval(model(mx.array([call])))
        assert len(streamer.guarded) <= (1 if call is PROMPT else 2)  # a token's: the experts in slots, and the others


def test_a_file_cut_short_while_it_is_in_use(stream: Callable[..., Any], tmp_path: Path) -> None:
    folder = make_mixture(tmp_path / "mixtral", "mixtral")
    model, streamer = stream(folder, 2)
    everything(model)
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(ReadError, match=r"ends early.*truncated: .*download a checkpoint again"):
        everything(model)
    with pytest.raises(ReadError, match="was changed while it was in use"):
        streamer.verify_unchanged()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 100}, "cannot run the model that .*kth"),
        ({"hidden_size": "x"}, r"cannot build the model that the config.json of /.*/copy describes \(mixtral\)"),
        ({"num_attention_heads": 0}, "cannot build the model"),
        ({"num_local_experts": 5}, "cannot load .*Expected shape .5, 64."),
        ({"text_config": None}, "cannot load .*NoneType"),
        ({"quantization": {"bits": 4}}, "cannot load .*KeyError: 'group_size'"),
        ({"rope_theta": "a"}, "cannot run the model"),
        # MLX would divide by it, which ends the process (found by the fuzzer).
        ({"quantization": {"bits": 4, "group_size": 0}}, "config.json: quantization.group_size is 0"),
        (
            {"quantization": {"bits": 4, "group_size": 64, "lm_head": {"group_size": False, "bits": 4}}},
            "lm_head.group_size",
        ),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 0}},
            "quantization_config.group_size",
        ),
    ],
)
def test_a_config_that_is_wrong(
    mixture_of: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(mixture_of("mixtral"), folder)
    write_tokenizer(folder, VOCABULARY)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load.load(folder, context=64)


def test_a_modelopt_file_with_groups_of_none(mixture_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(mixture_of("mixtral"), tmp_path / "copy"))
    write_tokenizer(folder, VOCABULARY)
    settings = {"quant_method": "modelopt", "quantization": {"quant_algo": "NVFP4", "group_size": 0}}
    (folder / "hf_quant_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: .*quantization\.group_size is 0"):
        load.load(folder, context=64)


def test_more_scales_than_numbers(mixture_of: Callable[..., Path], tmp_path: Path) -> None:
    """mlx-lm would infer a group size of zero from them, and MLX would divide by it."""
    folder = Path(shutil.copytree(mixture_of("qwen3_moe", quantisation="4 bits"), tmp_path / "copy"))
    write_tokenizer(folder, VOCABULARY)
    weights: Any = mx.load(str(folder / "model.safetensors"))
    name = next(name for name in weights if name.endswith("q_proj.scales"))
    weights |= {name: mx.zeros((weights[name].shape[0], 1000))}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(CheckpointError, match=r"q_proj\.scales has 1000 columns"):
        load.load(folder, context=64)


def test_a_config_that_is_no_json(mixture_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(mixture_of("mixtral"), folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="Download the checkpoint again"):
        load.load(folder)


def test_positions_that_are_no_number(mixture_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(mixture_of("mixtral"), folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": "many"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="max_position_embeddings is 'many'"):
        plan_in_place(folder, open_in_place(folder), LoadOptions(context=64))


def test_the_vocabulary_is_the_logits(tmp_path: Path) -> None:
    """A configuration may leave the vocabulary to the family's default."""
    folder = make_mixture(tmp_path / "mixtral", "mixtral", vocab_size=32000)
    config = json.loads((folder / "config.json").read_text())
    del config["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config))
    mixture = open_in_place(folder)
    assert needs_of(mixture.model, streamed_layers(mixture), 64).vocabulary == 32000


def test_a_missing_tokenizer_is_noticed_before_the_experts_are_read(
    mixture_of: Callable[..., Path], tmp_path: Path
) -> None:
    """The plan also includes the tokenizer's memory."""
    folder = tmp_path / "copy"
    shutil.copytree(mixture_of("gpt_oss"), folder, ignore=shutil.ignore_patterns("tokenizer*"))
    said: list[str] = []
    with pytest.raises(CheckpointError, match="has no tokenizer files"):
        load.load(folder, say=said.append)
    assert not any("total" in text for text in said)


def test_generation_stays_within_the_plan_and_says_the_same(
    mixture_of: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = mixture_of("qwen3_moe", "4 bits")
    write_tokenizer(folder, VOCABULARY)
    texts = set()
    smallest = ""
    for memory in (None, "1MB", "smallest"):
        command = [sys.executable, "-m", "mlx_flash.generate", "--model", str(folder), "--context", "256", "--json"]
        command += ["--prompt", "the quick brown fox", "--max-tokens", "12", "--ignore-chat-template"]
        if memory is not None:
            command += ["--memory", smallest if memory == "smallest" else memory]
        done = subprocess.run(command, capture_output=True, text=True)
        if memory == "1MB":
            assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
            smallest = re.search(r"needs at least (\d+MB)", done.stderr)[1]  # type: ignore[index]
            continue
        assert done.returncode == 0, done.stderr
        assert "experts of each layer" in done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        assert result["predictor"] == "router" and result["peak_memory_bytes"] <= result["plan"]["total"]
        texts.add(tuple(result["tokens"]))
    assert len(texts) == 1
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_only_what_is_widened_is_planned_for(
    mixture_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales in 16 bits, which most published checkpoints have, are not widened, because their weights are packed."""
    for name, quantisation in (("plain", "plain"), ("packed", "4 bits")):
        folder = tmp_path / name
        shutil.copytree(mixture_of("qwen3_moe", quantisation), folder)
        weights: Any = mx.load(str(folder / "model.safetensors"))
        rounded = {n: a.astype(mx.bfloat16) if a.dtype == mx.float32 else a for n, a in weights.items()}
        mx.eval(rounded)
        mx.save_safetensors(str(folder / "model.safetensors"), rounded)
        mixture = open_in_place(folder)
        planned = needs_of(mixture.model, streamed_layers(mixture), 64).workspace
        monkeypatch.setattr("mlx_flash.loading.streaming_needs.is_widened", lambda *_: False)
        without = needs_of(mixture.model, streamed_layers(mixture), 64).workspace
        monkeypatch.undo()
        assert (planned > without) == (name == "plain")


def test_widening_a_few_experts_at_a_time_changes_no_bit() -> None:
    """Widens 40 experts in one call or in groups: for tokens sorted by expert, and for a token and its choices."""
    experts, width, rows = 40, 32, 24
    linear = SwitchLinear(width, rows, experts, bias=True)
    linear.update(tree_map(lambda array: array.astype(mx.bfloat16), linear.parameters()))
    linear.bias = mx.random.normal((experts, rows)).astype(mx.bfloat16)
    widened = Widened(linear)
    flat = np.sort(np.random.default_rng(0).integers(0, experts, 300))
    cases = [
        (mx.random.normal((300, 1, width)).astype(mx.bfloat16), flat, True),
        (
            mx.random.normal((1, 2, 1, 1, width)).astype(mx.bfloat16),
            np.arange(40)[::-1].reshape(1, 2, 20).copy(),
            False,
        ),
    ]
    for x, indices, in_order in cases:
        grouped = widened(x, mx.array(indices.astype(np.uint32)), in_order)
        whole = widened._widened(x, indices, np.unique(indices), in_order)
        assert grouped.dtype == mx.bfloat16 and mx.array_equal(grouped, whole)


def test_a_predictor_is_a_mistake(mixture_of: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="its router chooses"):
        load.load(mixture_of("mixtral"), predictor="shadow")
    with pytest.raises(UsageError, match="nothing is predicted"):
        load.load(mixture_of("mixtral"), recall=0.9)


def test_nothing_of_an_expert_is_a_parameter(mixture_of: Callable[..., Path], stream: Callable[..., Any]) -> None:
    folder = mixture_of("deepseek_v3")
    model, _ = stream(folder, 2)
    plain: Any = dict(tree_flatten(load_model(folder, lazy=True)[0].parameters()))
    rest = dict(tree_flatten(model.parameters()))
    assert {name for name in plain if "switch_mlp" not in name} == set(rest)
    assert any("shared_experts" in name for name in rest)
