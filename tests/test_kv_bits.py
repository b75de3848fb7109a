"""Quantised KV caches: which models can have them, what they change, and that the plan counts them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]  # found beside this file
from golden_models import VARIANTS, arguments, config_of  # type: ignore[import-not-found]
from mixtures import FAMILIES, make_mixture  # type: ignore[import-not-found]
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache, make_prompt_cache
from slow_cases import slow  # type: ignore[import-not-found]
from test_memory_needs import mixture_model  # type: ignore[import-not-found]
from tiny import make_checkpoint  # type: ignore[import-not-found]

from mlx_flash.errors import UsageError
from mlx_flash.flash.files import round_up
from mlx_flash.loading import memory_needs
from mlx_flash.loading.load import load, plan
from mlx_flash.loading.memory_needs import needs_of
from mlx_flash.loading.model_types import model_classes
from mlx_flash.loading.quantised_cache import plain_cache, quantise_cache
from mlx_flash.text.cached_context import make_room
from mlx_flash.text.prompt_cache import ReusedPromptCache

pytestmark = pytest.mark.usefixtures("one_processor")

# Heads whose width can be quantised; the tests' other mixtures have narrower ones.
WIDE = {"hidden_size": 128, "head_dim": 32, "v_head_dim": 64, "qk_rope_head_dim": 32, "kv_lora_rank": 64}
# Attention with sinks, and attention that treats keys as one array. Of our own models, Phi does the latter.
REFUSED = {"gpt_oss": "sinks", "deepseek_v3": "tuple"}
TOKENS: list[int] = np.random.default_rng(0).integers(0, 60, 40).tolist()
IDS = mx.array([TOKENS])


def wide_mixture(family: str, **changes: Any) -> tuple[Any, list[Any]]:
    mx.random.seed(1)
    model, places = mixture_model(family, **WIDE, **changes)
    return model, [(*place, lambda _: 0) for place in places]


def through(model: Any, cache: list[Any], prompt: int = 30) -> mx.array:
    """The logits of IDS, (1, T, V): a prompt, then single tokens."""
    total = IDS.shape[1]
    pieces = [model(IDS[:, :prompt], cache=cache)]
    pieces += [model(IDS[:, at : at + 1], cache=cache) for at in range(prompt, total)]
    return mx.concatenate(pieces, axis=1)


def far(model: Any, bits: int, layers: list[Any]) -> float:
    """How much a quantised cache changes logits on average, as a share of their standard deviation."""
    plain = through(model, make_prompt_cache(model))
    quantise_cache(model, layers, bits)
    quantised = through(model, make_prompt_cache(model))
    return float(np.abs(np.array(plain - quantised)).mean() / np.array(plain).std())


# -- models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - REFUSED.keys()))
def test_mixtures(family: str) -> None:
    model, layers = wide_mixture(family)
    eight = far(model, 8, layers)
    del model.make_cache
    assert 0 < eight < 0.02 and eight < far(model, 4, layers) < 0.3


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "phi-relu"])
def test_our_own_models(variant: str) -> None:
    """Heads of 32 numbers, with learned positions, rotations, windows or ALiBi, and one to four keys per token."""
    changes = {"hidden_size": 128, "ffn_dim": 256, "word_embed_proj_dim": 128, "intermediate_size": 256, "head_dim": 32}
    changes = {key: value for key, value in changes.items() if key in config_of(variant)}
    mx.random.seed(1)
    model = model_classes(config_of(variant) | changes)[0](arguments(variant, **changes))
    layers = [(layer, "mlp", lambda _: 0) for layer in model.layers]
    eight = far(model, 8, layers)
    del model.make_cache
    assert 0 < eight < 0.02 and eight < far(model, 4, layers) < 0.4


@pytest.mark.parametrize("family", REFUSED)
def test_attention_that_reads_its_keys_in_another_way(family: str) -> None:
    model, layers = wide_mixture(family)
    with pytest.raises(UsageError, match=f"attention cannot read a quantised KV cache: .*{REFUSED[family]}"):
        quantise_cache(model, layers, 8)
    assert isinstance(make_prompt_cache(model)[-1], KVCache)


def test_widths_and_kinds_that_cannot_be_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    model, places = mixture_model("mixtral")
    layers = [(*place, lambda _: 0) for place in places]
    with pytest.raises(UsageError, match=r"have 16 numbers, and only multiples of 32 .* Leave --kv-bits"):
        quantise_cache(model, layers, 8)
    model, layers = wide_mixture("mixtral")
    rotating = lambda self: [RotatingKVCache(32) for _ in self.layers]  # noqa: E731
    monkeypatch.setattr(type(model), "make_cache", rotating, raising=False)
    with pytest.raises(UsageError, match=r"caches \(RotatingKVCache\) that cannot be quantised"):
        quantise_cache(model, layers, 8)


def test_only_plain_caches_are_quantised_and_the_plan_says_how_many() -> None:
    model, layers = wide_mixture("qwen3_next")
    assert quantise_cache(model, layers, 8) == "8 bits in 1 of 4 layers"
    assert [type(part).__name__ for part in make_prompt_cache(model)] == ["ArraysCache"] * 3 + ["QuantizedKVCache"]
    assert quantise_cache(wide_mixture("mixtral")[0], layers[:0], 4) == "4 bits"


@pytest.mark.parametrize(("width", "group_size"), [(32, 32), (64, 64), (96, 32), (128, 64)])
def test_group_sizes(width: int, group_size: int) -> None:
    model, places = mixture_model("mixtral", hidden_size=4 * width)
    quantise_cache(model, [(*place, lambda _: 0) for place in places], 8)
    (first, *_) = make_prompt_cache(model)
    assert isinstance(first, QuantizedKVCache) and (first.group_size, first.bits) == (group_size, 8)


def test_a_model_is_freed_with_its_last_reference() -> None:
    model, layers = wide_mixture("mixtral")
    quantise_cache(model, layers, 8)
    assert isinstance(plain_cache(model)[0], KVCache)
    gone = weakref.ref(model)
    del layers, model
    assert gone() is None


# -- memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "bits"),
    [("mixtral", 8), ("mixtral", 4), ("glm4_moe", 4), ("qwen3_next", 8), slow("glm4_moe", 8), slow("qwen3_next", 4)],
)
def test_no_more_is_taken_than_is_computed(family: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As test_no_family_takes_more_than_is_computed, and the cache takes exactly what is computed."""
    chunk, context, step = 64, 320, 32
    monkeypatch.setattr(memory_needs, "PREFILL_TOKENS", chunk)
    monkeypatch.setattr(memory_needs, "KV_STEP_TOKENS", step)
    monkeypatch.setattr(QuantizedKVCache, "step", step)
    monkeypatch.setattr(memory_needs, "_fused_as_on_metal", lambda _: nullcontext())
    model, layers = wide_mixture(family)
    quantise_cache(model, layers, bits)
    early, late = (needs_of(model, layers, context, as_on_metal=as_on_metal) for as_on_metal in (False, True))
    assert early.kv_cache == late.kv_cache and early.workspace <= late.workspace

    def evaluated(x: mx.array, indices: mx.array) -> mx.array:
        mx.eval(x, indices)
        answer = mx.zeros((*indices.shape, x.shape[-1]), x.dtype)
        mx.eval(answer)
        return answer

    for parent, key, _ in layers:
        parent[key] = evaluated
    mx.eval(model.parameters())
    cache = make_prompt_cache(model)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(0, context, chunk):
        model(mx.zeros((1, chunk), mx.int32), cache=cache)
        mx.eval([part.state for part in cache])
    taken = mx.get_peak_memory() - before
    assert sum(part.nbytes for part in cache) == early.kv_cache
    assert 0.5 * (early.kv_cache + early.workspace) <= taken <= late.kv_cache + late.workspace


@pytest.mark.parametrize(("bits", "per_number"), [(8, 1 + 8 / 32), (4, 0.5 + 8 / 32)])
def test_bits_scales_and_biases_are_counted(bits: int, per_number: float) -> None:
    """In groups of 32 numbers, each with a scale and a bias in float32."""
    model, layers = wide_mixture("mixtral")
    plain = needs_of(model, layers, 1024).kv_cache
    quantise_cache(model, layers, bits)
    assert needs_of(model, layers, 1024).kv_cache == plain / 4 * per_number


def test_the_cpu_copies_keys_that_heads_share() -> None:
    """Measured on MLX's CPU backend: four heads that share quantised keys take four copies of them."""
    x = mx.zeros((1, 4, 4, 8, 64))
    keys = [mx.expand_dims(part, -3) for part in mx.quantize(mx.zeros((1, 4, 1024, 64)), group_size=64, bits=8)]
    mx.eval(x, keys)

    def scores(*arrays: mx.array) -> list[mx.array]:
        x, weight, scales, biases = arrays
        return [mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=64, bits=8)]

    graph = memory_needs.trace(scores, x, *keys)
    ends = [memory_needs.Evaluation([graph.outputs[0].name])]
    computed = memory_needs.peak_bytes(graph, ends, [], drops_late=False)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(scores(x, *keys))
    if mx.default_device() == mx.cpu:
        assert mx.get_peak_memory() - before == computed
    assert computed > 4 * sum(part.nbytes for part in keys) > memory_needs.peak_bytes(graph, ends, [], drops_late=True)


# -- a whole model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mlx_flash.convert.conversion import Settings, convert

    folder = tmp_path_factory.mktemp("wide")
    checkpoint = make_checkpoint(folder / "checkpoint", hidden=128, positions=1024)
    write_tokenizer(checkpoint)
    convert(checkpoint, folder / "store", Settings(calibration_tokens=256, predictor_memory=1 << 20))
    return folder / "store"


@pytest.fixture(scope="module")
def wide_mixture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_mixture(
        tmp_path_factory.mktemp("wide") / "mixture", "qwen3_moe", **WIDE, max_position_embeddings=1024
    )
    write_tokenizer(folder)
    return folder


@pytest.fixture(params=["store", "mixture"])
def folder(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("wide_store" if request.param == "store" else "wide_mixture_folder")


def test_a_conversation_keeps_a_quantised_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its turns give the text that whole prompts give, and it takes what the plan counts."""
    model, tokenizer = load(folder, context=600, kv_bits=8, predictor="auto")
    monkeypatch.setattr(type(tokenizer), "eos_token_ids", {-1}, raising=False)
    tokenizer._eos_token_ids = {-1}
    try:
        assert "600 tokens, 8 bits" in model.flash.plan.describe()
        turns, prompt = ReusedPromptCache(model), TOKENS
        for question in ([], [7, 8, 9], [3] * 300):
            prompt = [*prompt, *question]
            said = [response.token for response in turns.stream_generate(tokenizer, prompt, 5)]
            assert all(isinstance(part, QuantizedKVCache) for part in turns._last.cache)
            again = ReusedPromptCache(model)
            assert [response.token for response in again.stream_generate(tokenizer, prompt, 5)] == said
            prompt += said
        back = prompt[:50]
        list(turns.stream_generate(tokenizer, back, 1))
        assert turns.reused == len(TOKENS) + 4  # the end of the first turn
        make_room(turns._last.cache, 600)
        assert sum(part.nbytes for part in turns._last.cache) == model.flash.plan.demand.kv_cache
        plain = plan(folder, context=600)
        assert plain.demand.kv_cache > 3 * model.flash.plan.demand.kv_cache
        steps = generate_step(
            mx.array(TOKENS), model, max_tokens=2
        )  # mlx-lm's own functions take such a cache by themselves
        assert len(list(steps)) == 2
    finally:
        model.flash.close()


@pytest.mark.parametrize("kept", [1, 255, 256, 300])
@pytest.mark.parametrize("more", [1, 57, 600])
def test_a_cache_grows_in_whole_steps(kept: int, more: int) -> None:
    numbers = mx.random.normal((1, 2, 1200, 32))
    caches = [QuantizedKVCache(32, 8), QuantizedKVCache(32, 8)]
    for cache in caches:
        cache.update_and_fetch(numbers[:, :, : kept + 30], numbers[:, :, : kept + 30])
        cache.trim(30)
    make_room(caches[:1], kept + more)
    found = [
        cache.update_and_fetch(numbers[:, :, kept : kept + more], numbers[:, :, kept : kept + more]) for cache in caches
    ]
    for ours, mlx_lms in zip(found[0][0], found[1][0], strict=True):
        assert mx.array_equal(ours, mlx_lms)
    assert caches[0].keys[0].shape[2] == round_up(max(kept + 30, kept + more), 256)


def test_wrong_values(wide_store: Path) -> None:
    for wrong in (16, 0, "8", True, 8.0):
        with pytest.raises(UsageError, match=r"kv_bits is .*, expected 8 or 4"):
            plan(wide_store, kv_bits=wrong)


def test_a_store_that_cannot(store: Path, open_model: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="only multiples of 32"):
        load(store, kv_bits=8)
