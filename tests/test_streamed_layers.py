"""Models whose layers are read when a token reaches them, against mlx-lm's resident model, bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from interrupts import InterruptAt  # type: ignore[import-not-found]
from mixtures import FAMILIES, assert_same, make_mixture, open_streamed  # type: ignore[import-not-found]
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from slow_cases import others, slow  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.bench.synthetic.dense_checkpoint import write_dense
from mlx_flash.errors import BudgetError, ReadError, UsageError
from mlx_flash.flash.in_place import InPlaceFiles
from mlx_flash.flash.unit_sums import RangeSums
from mlx_flash.layers.experts import StreamedExperts
from mlx_flash.layers.shared_reading import SharedReading, bytes_to_share
from mlx_flash.loading import layer_weights
from mlx_flash.loading.in_place_loading import plan_in_place
from mlx_flash.loading.in_place_model import open_in_place
from mlx_flash.loading.in_place_plan import InPlacePlan, WeightBytes, divide_in_place, with_spare_for_chunks
from mlx_flash.loading.layer_weights import spread
from mlx_flash.loading.options import LoadOptions
from mlx_flash.loading.plan import ENDLESS, Demand, Plan, PlanNotes, UnitCounts, plan_for_budget

PROMPT = list(range(3, 40))
WIDE = {"num_hidden_layers": 5, "intermediate_size": 128}
# One dense model of every form: fused and separate projections, norms around and within, windows, recurrences, a tied
# head, parallel blocks, a state beside attention.
DENSE: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gemma2": {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2},
    "cohere2": {"sliding_window": 8, "sliding_window_pattern": 2, "layer_norm_eps": 1e-5, "logit_scale": 0.5},
    "olmo2": {},
    "starcoder2": {"norm_epsilon": 1e-5, "use_bias": True},
    "glm4": {"partial_rotary_factor": 0.5, "attention_bias": False},
    "minicpm3": {
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
        "scale_depth": 1.4, "scale_emb": 1, "dim_model_base": 64, "rope_scaling": {"type": "su"},
    },
    "mamba2": {
        "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "expand": 2, "conv_kernel": 4,
        "layer_norm_epsilon": 1e-5, "use_bias": False, "use_conv_bias": True, "residual_in_fp32": True,
        "time_step_limit": [0.0, 100.0], "time_step_rank": "auto", "rms_norm": True, "chunk_size": 64,
    },
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"], "conv1d_width": 4, "logits_soft_cap": 30.0, "lru_width": 64,
        "attention_window_size": 16, "embeddings_scale_by_sqrt_dim": True, "mlp_expansion_ratio": 2,
    },
    "lfm2": {
        "block_dim": 64, "block_ff_dim": 128, "conv_L_cache": 3, "conv_bias": False, "norm_eps": 1e-5,
        "block_multiple_of": 64, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": [1, 3],
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models' tensors are short."""
    monkeypatch.setattr(layer_weights, "SHORTEST_TENSOR", 2048)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @functools.cache
    def make(family: str, quantisation: str = "plain", shards: int = 1) -> Path:
        changes = {**WIDE, **DENSE[family]} if family in DENSE else {}
        return make_mixture(tmp_path_factory.mktemp(family), family, quantisation, shards, **changes)

    return make


@pytest.fixture
def stream() -> Iterator[Callable[..., tuple[Any, InPlaceFiles]]]:
    streamers: list[InPlaceFiles] = []

    def open_one(folder: Path, pinned: int, slots: int = 2) -> tuple[Any, InPlaceFiles]:
        model, streamer = open_streamed(folder, slots, pinned=pinned)
        streamers.append(streamer)
        return model, streamer

    yield open_one
    for streamer in streamers:
        streamer.close()


def everything(model: Any) -> list[np.ndarray]:
    """Logits of a prompt, single tokens, a few tokens at once, and a batch without a cache."""
    cache = make_prompt_cache(model)
    calls = [PROMPT, [4], [9], [77, 31], [6], [9]]
    results = [np.array(model(mx.array([call]), cache=cache).astype(mx.float32)) for call in calls]
    return [*results, np.array(model(mx.array([PROMPT[:9], PROMPT[9:18]])).astype(mx.float32))]


@functools.cache
def reference(folder: Path) -> list[np.ndarray]:
    return everything(load_model(folder)[0])


@pytest.mark.parametrize(
    ("family", "quantisation"),
    others(
        [(family, quantisation) for family in (*DENSE, *FAMILIES) for quantisation in ("plain", "4 bits")],
        [*((family, "4 bits") for family in (*DENSE, *FAMILIES)), ("llama", "plain"), ("mixtral", "plain")],
    ),
)
def test_every_form_has_the_bits_of_mlx_lm(
    model_of: Callable[..., Path], stream: Callable[..., Any], family: str, quantisation: str
) -> None:
    """Dense models, and mixtures of which neither the experts nor the layers are in memory."""
    folder = model_of(family, quantisation)
    layers = len(open_in_place(folder).layers)
    assert layers >= 2
    for pinned in (0, 1):
        model, streamer = stream(folder, pinned)
        assert_same(everything(model), reference(folder), pinned)
        assert_same(everything(model), reference(folder), (pinned, "again"))
        assert streamer.counters.bytes > 0


def test_shards_and_any_number_of_pinned_layers(model_of: Callable[..., Path], stream: Callable[..., Any]) -> None:
    folder = model_of("llama", "4 bits", 3)
    read = []
    for pinned in range(4):
        model, streamer = stream(folder, pinned)
        assert_same(everything(model), reference(folder), pinned)
        read.append(streamer.counters.bytes)
    assert read == sorted(read, reverse=True) and read[-1] < 0.7 * read[0]


def test_every_token_reads_the_streamed_layers_once(model_of: Callable[..., Path], stream: Callable[..., Any]) -> None:
    folder = model_of("qwen3")
    model, streamer = stream(folder, 1)
    cache = make_prompt_cache(model)
    model(mx.array([PROMPT]), cache=cache)
    sizes = [sum(t.nbytes for t in layer.tensors) for _, layer in spread(open_in_place(folder).layers, 1)]
    before = streamer.counters.copy()
    for token in range(10):
        mx.eval(model(mx.array([[token]]), cache=cache))
    spent = streamer.counters - before
    assert (spent.misses, spent.hits) == (40, 10)
    # Reads of unaligned tensors begin and end on the blocks of the disk.
    assert 10 * sum(sizes) <= spent.bytes <= 10 * (sum(sizes) + 4 * 20 * 8192)


def test_pinned_layers_are_spread() -> None:
    numbers = list(range(12))
    assert [number for number, _ in spread(numbers, 0)] == numbers
    assert [number for number, _ in spread(numbers, 3)] == [0, 1, 3, 4, 5, 7, 8, 9, 11]
    assert [number for number, _ in spread(numbers, 11)] in ([[n] for n in numbers])
    assert spread(numbers, 12) == []
    for count in range(60):
        for pinned in range(count + 1):
            assert len(spread(list(range(count)), pinned)) == count - pinned


@pytest.mark.parametrize("reads", ["before", "in another layer", "twice", "never"])
def test_layers_that_are_not_read_one_by_one_stay_in_memory(
    model_of: Callable[..., Path], stream: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, reads: str
) -> None:
    """A model may use a layer's weights at any time. Then they would be another layer's numbers."""
    from mlx_lm.models import llama

    call, whole = llama.TransformerBlock.__call__, llama.LlamaModel.__call__

    def early(self: Any, inputs: mx.array, cache: Any = None, **others: Any) -> mx.array:
        return whole(self, inputs, cache, **others) + self.layers[2].mlp.up_proj.weight[0, 0]

    def shared(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        return call(self, x, mask, cache) + others[-1].mlp.up_proj.weight[0, 0]

    def skipping(self: Any, inputs: mx.array, cache: Any = None, **others: Any) -> mx.array:
        held = self.layers
        self.layers = [held[0], *held] if reads == "twice" else held[1:]
        try:
            return whole(self, inputs, cache and cache[: len(self.layers)] + cache[len(held) :], **others)
        finally:
            self.layers = held

    folder = model_of("llama")
    others: list[Any] = []
    if reads == "before":
        monkeypatch.setattr(llama.LlamaModel, "__call__", early)
    elif reads == "in another layer":
        found = open_in_place(folder)
        others += found.model.layers
        monkeypatch.setattr(llama.TransformerBlock, "__call__", shared)
        assert [*layer_weights._order_of_calls(found.model, found.layers, [])] == []
        return
    else:
        monkeypatch.setattr(llama.LlamaModel, "__call__", skipping)
    assert open_in_place(folder).layers == []


def test_a_call_that_ends_early_leaves_the_right_weights(
    model_of: Callable[..., Path], stream: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_of("gemma2")
    model, streamer = stream(folder, 1)
    expected = reference(folder)
    layer = model.layers[3]
    kind: Any = type(layer).__base__
    call, calls = kind.__call__, [0]

    def failing(self: Any, *arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] % 7 == 3:
            raise RuntimeError("injected")
        return call(self, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(kind, "__call__", failing)
        for _ in range(12):
            try:
                model(mx.array([PROMPT]))
            except RuntimeError:
                continue
    assert_same(everything(model), expected, "after errors")
    assert streamer.reader.outstanding <= 2


def test_a_read_that_fails(
    model_of: Callable[..., Path], stream: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_of("llama")
    model, streamer = stream(folder, 0)
    wait, waits = streamer.wait, [0]

    def failing(ticket: Any) -> None:
        wait(ticket)
        waits[0] += 1
        if waits[0] in (3, 4, 9):
            raise ReadError("injected")

    monkeypatch.setattr(streamer, "wait", failing)
    for _ in range(3):
        with pytest.raises(ReadError, match="injected"):
            everything(model)
        assert streamer.reader.outstanding == 0
    assert_same(everything(model), reference(folder), "afterwards")


@pytest.mark.parametrize("step", [11, slow(1)])
def test_ctrl_c_at_every_line(model_of: Callable[..., Path], stream: Callable[..., Any], step: int) -> None:
    folder = model_of("llama")
    model, _ = stream(folder, 2)
    expected = reference(folder)[0]

    def watched(file: str) -> bool:
        return file.endswith(("flash/layer_ring.py", "layers/streamed_layers.py", "flash/inflight.py"))

    with InterruptAt(0, watched) as whole:
        np.array(model(mx.array([PROMPT])))
    assert whole.count > 200
    for line in range(1, whole.count + 1, step):
        try:
            with InterruptAt(line, watched):
                np.array(model(mx.array([PROMPT])))
        except KeyboardInterrupt:
            pass
        assert np.array_equal(np.array(model(mx.array([PROMPT]), cache=make_prompt_cache(model))), expected), line


def test_routers_that_are_not_in_memory_make_no_guesses(
    model_of: Callable[..., Path], stream: Callable[..., Any]
) -> None:
    for pinned, guesses in ((0, False), (3, True)):
        model, _ = stream(model_of("deepseek_v3"), pinned)
        found = [module.ahead for _, module in model.named_modules() if isinstance(module, StreamedExperts)]
        assert any(ahead is not None for ahead in found) is guesses


def test_a_truncated_file_is_named(model_of: Callable[..., Path], stream: Callable[..., Any], tmp_path: Path) -> None:
    folder = make_mixture(tmp_path / "model", "llama", **WIDE)
    model, _ = stream(folder, 0)
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 3)
    with pytest.raises(ReadError, match=r"model\.safetensors: model\.layers\.\d\..*\.weight: the file ends early"):
        everything(model)


def divided(weights: WeightBytes, budget: int, choices: int = 1, free: int = 10**9) -> InPlacePlan:
    def divide(units: UnitCounts, demand: Demand, slot_bytes: int, note: str, budget: int | None) -> Plan:
        return plan_for_budget(demand, units, slot_bytes, budget, free, 64, notes=PlanNotes(note), prompt_caches=0)

    demand = Demand(10**6, sum(weights.resident) + weights.tables, 0, 10**6, 10**6)
    return divide_in_place(divide, weights, demand, choices, budget)


def test_the_plan_of_a_dense_model() -> None:
    weights = WeightBytes([5 * 10**6], [10**6] * 9 + [2 * 10**6], 2 * 10**6, 0, 0, 0, 0)
    whole = divided(weights, ENDLESS)
    assert whole.slots == (10,) and whole.pinned == 10 and whole.layer_bytes_per_token == 0
    assert (whole.demand.resident, whole.slot_bytes) == (5 * 10**6, 2 * 10**6)
    assert whole.smallest == 17 * 10**6  # two buffers and 4 MiB to spare
    plans = [divided(weights, (12 + megabytes) * 10**6) for megabytes in (4, 7, 10, 20)]
    assert [plan.slots for plan in plans] == [(4,), (5,), (7,), (10,)]
    assert [plan.pinned for plan in plans] == [2, 3, 5, 10]
    assert "4 of 10 layers (40%): 2 stay, the others pass through 2\n" in plans[0].describe()
    assert "10 of 10 layers (100%)\n" in plans[3].describe()
    assert [plan.layer_bytes_per_token for plan in plans] == sorted(
        (plan.layer_bytes_per_token for plan in plans), reverse=True
    )
    with pytest.raises(BudgetError, match=r"at least 17MB .* 4 MB fewest slots"):
        divided(weights, 11 * 10**6)


def test_the_plan_of_a_mixture_streams_layers_only_where_it_must() -> None:
    weights = WeightBytes([5 * 10**6], [10**6] * 20, 10**6, 10**5, 20, 16, 0)
    experts = divided(weights, 40 * 10**6, choices=4)
    assert experts.pinned == 20 and experts.layer_bytes_per_token == 0 and len(experts.slots) == 20
    layers = divided(weights, 25 * 10**6, choices=4)
    assert layers.expert_slots == (4,) * 20 and 0 < layers.pinned < 20
    assert layers.demand.resident == 5 * 10**6 + 20 * 4 * 10**5
    assert "4 of 16 experts of each layer" in layers.describe()
    least = divided(weights, 16 * 10**6, choices=4)
    assert least.expert_slots == (1,) * 20
    assert experts.smallest == layers.smallest == least.smallest == 17 * 10**6
    assert experts.everything == layers.everything
    assert experts.budgets() == layers.budgets()
    with pytest.raises(BudgetError) as caught:
        divided(weights, 11 * 10**6, choices=4)
    assert (caught.value.smallest_bytes, caught.value.full_bytes) == (layers.smallest, layers.everything)


def test_a_dense_model_takes_no_predictor(model_of: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="every token needs every layer, so nothing is predicted"):
        mlx_flash.plan(model_of("qwen3"), predictor="none")


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_what_is_read_is_compared_with_sums(
    model_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """A bit that changes between two readings of a layer is noticed."""
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path))
    folder = model_of(family)
    mixture = open_in_place(folder)
    plan, build, *_ = plan_in_place(folder, mixture, LoadOptions(memory=ENDLESS, context=64, verify=True))
    object.__setattr__(plan, "pinned", 0)
    model = build(lambda _: None)
    try:
        assert_same(everything(model), reference(folder), "verified")
        sums = [file.sums for file in model.flash.streamer.files]
        assert all(isinstance(one, RangeSums) for one in sums)
        tensor = mixture.layers[-1].tensors[0]
        number, offset, _ = tensor.segments[0]
        place = int(np.searchsorted(sums[number].ranges.offsets, offset))
        sums[number].sums[place] ^= 1
        with pytest.raises(ReadError, match=r"model\.layers\..* have the checksum"):
            everything(model)
    finally:
        model.flash.close()


SHARE = ["llama", "qwen3", "phi3", "gemma2", "starcoder2", "minicpm3", "qwen3_moe", "deepseek_v2", "granitemoe"]
SHARE += ["gemma3_text", "cohere2", "gpt_oss"]  # with windows that the prompt leaves


@pytest.mark.parametrize("family", SHARE)
def test_chunks_share_a_reading_and_keep_their_bits(
    model_of: Callable[..., Path], stream: Callable[..., Any], family: str
) -> None:
    folder = model_of(family)
    model, streamer = stream(folder, 0 if family == "llama" else 1)
    layers = [layer.module for layer in open_in_place(folder).layers]
    layers = [module for module in model.layers][: len(layers)]
    assert bytes_to_share(model, layers, make_prompt_cache(model)) == 4 * 64
    apart, together = make_prompt_cache(model), make_prompt_cache(model)
    chunks = [PROMPT[:16], PROMPT[16:32], PROMPT[32:]]
    before = streamer.counters.copy()
    for chunk in chunks:
        model(mx.array([chunk]), cache=apart)
        mx.eval([part.state for part in apart])
    between = streamer.counters.copy()
    assert SharedReading(layers, 3).feed(model, chunks, together)
    after = streamer.counters.copy()
    if family in DENSE:
        assert 2.9 < (between - before).bytes / (after - between).bytes < 3.1
    assert [part.offset for part in apart] == [part.offset for part in together]
    for token in (5, 9):
        a, b = (np.array(model(mx.array([[token]]), cache=cache)) for cache in (apart, together))
        assert np.array_equal(a, b) and np.isfinite(a).all()


@pytest.mark.parametrize("family", ["recurrent_gemma", "lfm2", "mamba2", "qwen3_next"])
def test_caches_that_say_more_than_their_offset_are_not_shared(
    model_of: Callable[..., Path], stream: Callable[..., Any], family: str
) -> None:
    model, _ = stream(model_of(family), 1)
    cache = make_prompt_cache(model)
    assert not SharedReading(list(model.layers), 3).feed(model, [PROMPT[:16], PROMPT[16:32]], cache)
    assert np.array_equal(np.array(model(mx.array([PROMPT]), cache=cache)), reference(model_of(family))[0])


@pytest.mark.parametrize("change", ["between layers", "a pair", "an argument"])
def test_layers_that_do_not_pass_on_one_array_are_not_shared(
    model_of: Callable[..., Path], stream: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    from mlx_lm.models import llama

    def call(self: Any, inputs: mx.array, cache: Any = None, *_: Any, **__: Any) -> mx.array:
        h = self.embed_tokens(inputs)
        for layer, part in zip(self.layers, cache, strict=True):
            mask = "causal" if inputs.shape[1] > 1 else None
            if change == "an argument":
                mask = h[0, :, :1] > 0
            h = layer(h, mask, cache=part)
            h = h[0] if change == "a pair" else h * 1.5 if change == "between layers" else h
        return self.norm(h)

    block = llama.TransformerBlock.__call__
    monkeypatch.setattr(llama.LlamaModel, "__call__", call)
    if change == "a pair":
        monkeypatch.setattr(llama.TransformerBlock, "__call__", lambda *a, **n: (block(*a, **n), 1))
        model, _ = open_streamed(model_of("llama"), 1)
        assert bytes_to_share(model, list(model.layers), make_prompt_cache(model)) == 0
        return
    model, _ = open_streamed(model_of("llama"), 1)
    assert not SharedReading(list(model.layers), 2).feed(model, [PROMPT[:9], PROMPT[9:]], make_prompt_cache(model))


def test_a_prompt_of_several_chunks_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the public functions: the same text, and a fraction of the reads."""
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    size = write_dense(folder, "tiny", 8, "float32", 0)
    texts, read = [], []
    for most in (1, 4):
        whole: Any = mlx_flash.plan(folder, memory=ENDLESS, context=64)
        budget = whole.demand.total + 5 * whole.slot_bytes
        model, tokenizer = mlx_flash.load(folder, memory=budget, context=64)
        try:
            assert 0 < model.flash.plan.pinned < 8
            assert model.flash.plan.parameters_bytes == size
            model.flash.shared_reading = SharedReading(list(model.layers), most)
            answers = list(mlx_flash.stream_generate(model, tokenizer, PROMPT, max_tokens=8, prefill_step_size=9))
            texts.append([answer.token for answer in answers])
            read.append(answers[-1].statistics.prompt.bytes)
        finally:
            model.flash.close()
    assert texts[0] == texts[1] and len(texts[0]) > 1
    assert read[1] < 0.5 * read[0]


def test_a_prompt_in_larger_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    write_dense(tmp_path / "model", "tiny", 4, "float32", 0)
    chunks: list[int] = []
    work = []
    for chunk in (8, 64):
        model, tokenizer = mlx_flash.load(tmp_path / "model", context=128, prefill_chunk=chunk)
        try:
            work.append(model.flash.plan.demand.workspace)
            call = type(model).__call__

            def noting(self: Any, tokens: mx.array, *rest: Any, call: Any = call, **named: Any) -> Any:
                chunks.append(tokens.shape[1])
                return call(self, tokens, *rest, **named)

            with monkeypatch.context() as patched:
                patched.setattr(type(model), "__call__", noting)
                list(mlx_flash.stream_generate(model, tokenizer, PROMPT, max_tokens=1))
            with pytest.raises(UsageError, match=rf"prefill_step_size is 65; the plan makes room for 1 to {chunk}"):
                mlx_flash.generate(model, tokenizer, PROMPT, prefill_step_size=65)
        finally:
            model.flash.close()
    assert chunks == [8, 8, 8, 8, 4, 1, 36, 1]
    assert work[0] < work[1]
    with pytest.raises(UsageError, match="prefill_chunk is 0, expected 1 to"):
        mlx_flash.load(tmp_path / "model", prefill_chunk=0)


def test_the_plan_s_spare_memory_is_for_chunks_of_the_context() -> None:
    weights = WeightBytes([5 * 10**6], [10**6] * 10, 10**6, 0, 0, 0, 0)
    plan = divided(weights, 12 * 10**6 + 400_000)
    assert plan.budget - plan.total == 400_000
    assert with_spare_for_chunks(plan, 0, 500) == plan
    assert with_spare_for_chunks(replace(plan, context=2000), 300, 500).chunks_at_once == 3
    assert with_spare_for_chunks(replace(plan, context=900), 300, 500).chunks_at_once == 2
    assert with_spare_for_chunks(plan, 1000, 500).chunks_at_once == 1
    grown = with_spare_for_chunks(replace(plan, context=2000), 300, 500)
    assert grown.total == plan.total + 300_000 <= plan.budget
