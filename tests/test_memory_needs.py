"""The memory of a model beside weights and slots, computed from its graph, against MLX's own use."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mixtures import FAMILIES, config_of  # type: ignore[import-not-found]  # found beside this file
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.utils import _get_classes

from mlx_flash.defaults import KV_STEP_TOKENS
from mlx_flash.flash.files import NeuronLayout, round_up
from mlx_flash.loading import load, memory_needs, streaming_needs
from mlx_flash.loading import store as store_module
from mlx_flash.loading.graph_memory import Evaluation, Graph, eval_order, peak_bytes, trace
from mlx_flash.loading.in_place_model import parent_of
from mlx_flash.loading.memory_needs import InputShape, Needs, needs_of
from mlx_flash.loading.model_types import model_classes
from mlx_flash.loading.streaming_needs import loading_excess_bytes, neurons_need, process_bytes, reading_bytes
from mlx_flash.source.model_kind import switch_layers
from mlx_flash.source.resolve import demo_folder

pytestmark = pytest.mark.usefixtures("one_processor")

MB = 1 << 20


def mixture_model(family: str, **changes: Any) -> tuple[Any, list[tuple[Any, Any]]]:
    """A model with random weights, and the places of its switch layers."""
    config = {**config_of(family), "max_position_embeddings": 8192, **changes}
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    return model, [parent_of(model, path) for path, _ in switch_layers(model)]


def needs(family: str, context: int, as_on_metal: bool = False, **changes: Any) -> Needs:
    model, places = mixture_model(family, **changes)
    return needs_of(model, [(*place, lambda _: 0) for place in places], context, as_on_metal=as_on_metal)


# -- a graph's memory ------------------------------------------------------------------------------------------


def peak(function: Callable[..., mx.array], *shapes: tuple[int, ...], drops_late: bool = False) -> float:
    """The MiB that the evaluation takes, without its inputs."""
    graph = trace(lambda *arrays: [function(*arrays)], *map(mx.zeros, shapes))
    return peak_bytes(graph, [Evaluation([graph.outputs[0].name])], [], drops_late) / MB


ONE = (512, 512)  # a MiB in float32


def test_an_operation_takes_over_what_nothing_else_needs() -> None:
    assert peak(lambda x: mx.exp(mx.sin(x)) * 2, ONE) == 1
    assert peak(lambda x: (y := mx.sin(x)) + mx.exp(y), ONE) == 2
    assert peak(lambda x: mx.exp(mx.sin(x)).astype(mx.float16), ONE) == 1.5


def test_on_metal_nothing_goes_before_the_end() -> None:
    assert peak(lambda x: mx.sum(mx.sin(x) @ x, axis=0)[None] @ x, ONE) < 2.1
    assert peak(lambda x: ((x @ x) @ x) @ x, ONE) == 2
    assert peak(lambda x: ((x @ x) @ x) @ x, ONE, drops_late=True) == 3


def test_views_are_free_and_matmul_copies_rows_that_lie_apart() -> None:
    assert peak(lambda x: mx.sin(x).T[None, :, :, None].reshape(512, 512).T, ONE) == 1
    assert peak(lambda x: mx.sin(x) @ x.T, ONE) == 2
    assert peak(lambda x: mx.sin(x).reshape(8, 64, 512).swapaxes(0, 1).reshape(512, 512), ONE) == 2
    heads = peak(lambda x: x.reshape(512, 8, 64).swapaxes(0, 1) @ mx.zeros((64, 1)), ONE)
    assert heads == pytest.approx(1 + 8 * 512 * 4 / MB, rel=0.01)  # a copy of all heads, and the result


def test_scores_of_attention_are_there_once() -> None:
    """76 MiB were measured on MLX's CPU backend: 64 of scores, then scaled queries, a copy, the mask, the result."""

    def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        heads = q.reshape(1, 512, 32, 64).transpose(0, 2, 1, 3)
        return mx.fast.scaled_dot_product_attention(heads, k, v, scale=0.1, mask="causal")

    assert 64 < peak(attention, (1, 512, 2048), (1, 4, 1024, 64), (1, 4, 1024, 64)) < 76.5


def test_the_order_is_one_in_which_everything_is_there_in_time() -> None:
    model, _ = mixture_model("deepseek_v3")
    parameters: Any = tree_flatten(model.parameters())
    names, weights = [name for name, _ in parameters], [array for _, array in parameters]

    def call(*arrays: mx.array) -> list[mx.array]:
        model.load_weights(list(zip(names, arrays, strict=False)), strict=False)
        return [model(arrays[-1])]

    graph: Graph = trace(call, *weights, mx.zeros((1, 9), mx.int32))
    done: set[str] = set()
    order = eval_order(graph, [graph.outputs[0].name], done)
    assert len(order) == len(set(order)) > 100
    for operation in order:
        assert all(array.name in done for array in operation.inputs if array.name in graph.makes)
        done |= {array.name for array in operation.outputs}
    assert graph.outputs[0].name in done


# -- a model's needs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_takes_more_than_is_computed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares with MLX's count of allocated bytes. The host runs ahead, so no array is sure to be freed early."""
    chunk, context, step = 64, 300, 32
    monkeypatch.setattr(memory_needs, "PREFILL_TOKENS", chunk)
    monkeypatch.setattr(memory_needs, "KV_STEP_TOKENS", step)
    monkeypatch.setattr(KVCache, "step", step)
    monkeypatch.setattr(memory_needs, "_fused_as_on_metal", lambda _: nullcontext())
    model, places = mixture_model(family)
    layers = [(*place, lambda _: 0) for place in places]
    early, late = (needs_of(model, layers, context, as_on_metal=as_on_metal) for as_on_metal in (False, True))
    assert early.kv_cache == late.kv_cache and early.workspace <= late.workspace

    def evaluated(x: mx.array, indices: mx.array) -> mx.array:
        mx.eval(x, indices)
        answer = mx.zeros((*indices.shape, x.shape[-1]), x.dtype)
        mx.eval(answer)
        return answer

    for parent, key in places:
        parent[key] = evaluated
    mx.eval(model.parameters())
    cache = make_prompt_cache(model)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for begin in range(0, context, chunk):
        model(mx.zeros((1, min(chunk, context - begin)), mx.int32), cache=cache)
        mx.eval([part.state for part in cache])
    taken = mx.get_peak_memory() - before
    assert taken <= late.kv_cache + late.workspace
    assert taken >= 0.5 * (early.kv_cache + early.workspace)


def test_the_cache_grows_in_steps_and_is_there_twice_meanwhile() -> None:
    whole = needs("mixtral", 512)
    assert whole.kv_cache == needs("mixtral", 300).kv_cache == 2 * needs("mixtral", KV_STEP_TOKENS).kv_cache
    assert needs("mixtral", 600).kv_cache == needs("mixtral", 768).kv_cache  # read in chunks of 512 and 88
    # Keys and values of two heads of 16 numbers in 2 layers.
    assert whole.kv_cache == 2 * 2 * 2 * 16 * 4 * round_up(300, KV_STEP_TOKENS)


def test_a_window_keeps_no_more_than_it_and_a_chunk() -> None:
    short, long = needs("gpt_oss", 1024), needs("gpt_oss", 4096)
    full_layer = 2 * 2 * 16 * 4
    assert long.kv_cache - short.kv_cache == full_layer * (4096 - 1024)


def test_scores_grow_with_the_context_where_they_are_kept() -> None:
    """On Metal they are not kept if a fused kernel supports such heads. Multi-head latent attention makes its own."""
    heads, tokens, more = 4, 512, 2048
    scores = heads * tokens * more * 4

    def growth(family: str, as_on_metal: bool, **changes: Any) -> float:
        long = needs(family, 2048 + more, as_on_metal, **changes).workspace
        return (long - needs(family, 2048, as_on_metal, **changes).workspace) / scores

    assert 1 <= growth("mixtral", False) < 1.5
    assert growth("mixtral", True, hidden_size=4 * 64) < 0.3
    assert growth("mixtral", True, hidden_size=4 * 192) >= 1
    assert growth("mixtral", True, hidden_size=4 * 256) >= 1
    assert growth("deepseek_v3", True) >= 2  # scores of positions, and of the rest


def test_a_recurrence_is_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its graph is a loop over tokens. 8 tokens give nearly the same figure as all of them."""
    monkeypatch.setattr("mlx_flash.loading.memory_needs.LOOPED_TOKENS", 16)
    few = needs("qwen3_next", 64, num_hidden_layers=2, full_attention_interval=2)
    monkeypatch.setattr("mlx_flash.loading.memory_needs.LOOPED_TOKENS", 64)
    whole = needs("qwen3_next", 64, num_hidden_layers=2, full_attention_interval=2)
    assert few.kv_cache == whole.kv_cache and whole.workspace <= few.workspace < 1.5 * whole.workspace


def test_weights_may_be_planned_in_another_type() -> None:
    config = json.loads((demo_folder() / "config.json").read_text())
    model_class, args_class = model_classes(config)
    model = model_class(args_class.from_dict(config))
    before = dict(tree_flatten(model.parameters()))
    layers = [(layer, "mlp", lambda _: 0) for layer in model.layers]
    half, whole = (needs_of(model, layers, 512, dtype) for dtype in (mx.float16, mx.float32))
    assert whole.kv_cache == 2 * half.kv_cache and half.workspace < whole.workspace
    after = dict(tree_flatten(model.parameters()))
    assert before.keys() == after.keys() and all(after[name] is array for name, array in before.items())


# -- streaming -------------------------------------------------------------------------------------------------


def test_rows_that_are_widened_are_counted() -> None:
    plain = NeuronLayout.plan("float16", 2, 4096, 1024, ("up", "down"))
    packed = NeuronLayout.plan("float16", 2, 4096, 1024, ("up", "down"), bits=4)
    call = InputShape(tokens=512, width=1024, item_bytes=4, choices=1)
    rows = plain.piece_neurons * 1024 * 2
    in_half = neurons_need(plain, 8)(InputShape(512, 1024, 2, 1))
    assert neurons_need(plain, 8)(call) >= in_half + 2 * rows * 2
    assert neurons_need(packed, 8)(call) > neurons_need(packed, 8)(InputShape(512, 1024, 2, 1))
    assert neurons_need(plain, 8)(InputShape(1, 1024, 2, 1)) > 2 * 2 * rows  # in rounds, and then joined


def test_the_largest_tensor_is_loaded_beside_a_copy_of_itself() -> None:
    assert loading_excess_bytes([]) == 0
    assert loading_excess_bytes([100]) == 100
    assert loading_excess_bytes([100, 1, 1]) == 98
    assert loading_excess_bytes([10] * 20) == 10


def test_unaligned_reads_have_a_buffer_per_thread() -> None:
    assert reading_bytes(16, aligned=True) == 0
    assert reading_bytes(16, aligned=False) == 2 * reading_bytes(8, aligned=False) > 0


def test_the_process_is_measured_after_a_first_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    evaluate = mx.eval

    def noting(*arrays: Any) -> None:
        steps.append("operation")
        evaluate(*arrays)

    def measure() -> int:
        steps.append("measured")
        return 100

    monkeypatch.setattr(mx, "eval", noting)
    monkeypatch.setattr(streaming_needs, "current_memory_bytes", measure)
    assert process_bytes() > 100
    assert steps == ["operation", "measured"]


def test_what_came_with_the_first_model_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    margin, least = streaming_needs.PROCESS_MARGIN_BYTES, streaming_needs.LEAST_MARGIN_BYTES
    process, now = streaming_needs.ProcessMemory(), 200 * MB
    monkeypatch.setattr(streaming_needs, "return_freed_memory", lambda: None)
    monkeypatch.setattr(streaming_needs, "current_memory_bytes", lambda: now)
    assert process.planned_bytes() == now + margin
    now += 500 * MB  # whatever else the program makes before its first model
    assert process.planned_bytes() == now + margin
    process.model_closed()
    first = now + margin
    now += 20 * MB
    assert process.planned_bytes() == first
    now += 20 * MB
    assert process.planned_bytes() == now + least > first
    now -= 100 * MB
    assert process.planned_bytes() == now + margin


def test_a_model_that_cannot_be_called_is_a_sentence(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_flash.errors import CorruptStoreError

    def broken(*_: Any, **__: Any) -> Any:
        raise TypeError("unsupported operand")

    monkeypatch.setattr(store_module, "needs_of", broken)
    with pytest.raises(CorruptStoreError, match=r"config\.json describes a model that cannot be called: unsupported"):
        load.load(store)
