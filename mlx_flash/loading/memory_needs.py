"""The memory that a model needs beside weights and slots: its KV cache and its work space, from its own graph.

The model is called without weights. MLX returns the graph of a prompt chunk at the end of the context, and
graph_memory.py computes its memory. No family, kind of attention or kind of cache is named here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..defaults import KV_STEP_TOKENS, PREFILL_TOKENS
from ..flash.files import round_up
from ..layers.cache_parts import parts_of
from ..layers.streamed_layers import hook, unhook
from .cache_growth import counts_of, enlarge
from .graph_memory import Evaluation, peak_bytes, trace

# Float32 copies of a token's logits while the next token is chosen: log-probabilities, sorted, a mask.
LOGITS_COPIES = 8
# A recurrence without a kernel of its own is a loop over tokens, and its graph grows with them. The needs of many
# tokens are then extrapolated from this few.
LOOPED_TOKENS = 32
STANDARD_CACHES = "mlx_lm.models.cache"  # the module of the caches whose growth is known here
# For these widths of a head, MLX uses a Metal kernel that keeps no scores of a prompt, if keys and values are equally
# wide (MLX 0.32, scaled_dot_product_attention.cpp, has_fused_kernel and use_fallback).
FUSED_HEAD_DIMS = (64, 72, 80, 96, 128)


@dataclass(frozen=True)
class InputShape:
    """The size of the arguments of a streamed layer."""

    tokens: int
    width: int  # numbers per token
    item_bytes: int  # bytes per number
    choices: int  # units that each token names; 1 if the layer itself finds them


StreamedNeed = Callable[[InputShape], int]
"""Bytes that a streamed layer takes until it has its result."""


@dataclass(frozen=True)
class Needs:
    """The needs of a model for the planned context, in bytes."""

    kv_cache: int
    workspace: int  # of the largest step, in which a growing part of the cache exists twice
    vocabulary: int  # number of tokens that the model has logits for
    choices: int  # most units that a token names in a layer; 1 if the layers find them
    state_bytes: int = 0  # of the parts of the cache that do not grow: states of recurrences, windows
    decoding: int = 0  # of the work space, what a step of one token takes
    layer_kv_cache: int = 0  # of the KV cache, the largest layer's share at most

    def of_rows(self, rows: int) -> Needs:
        """The needs of so many answers that are decoded at once.

        A step of all takes at most `rows` times that of one. A row that joins or leaves makes all rows of one layer
        exist twice, with its own beside them. Prompts are read one at a time.
        """
        if rows == 1:
            return self
        moving = (rows + 1) * self.layer_kv_cache
        work = max(self.workspace, rows * self.decoding, moving)
        return replace(self, kv_cache=rows * self.kv_cache, workspace=work, state_bytes=rows * self.state_bytes)


def needs_of(
    model: Any,
    layers: Sequence[tuple[Any, Any, StreamedNeed | OneRow]],
    context: int,
    dtype: mx.Dtype | None = None,
    as_on_metal: bool = False,
    evaluated: Sequence[nn.Module] = (),
    chunk: int | None = None,
) -> Needs:
    """The needs of a model that mlx-lm makes a prompt cache for. Nothing is evaluated, and the model does not change.

    Args:
        model: the model, whose weights may be unread or random.
        layers: the streamed layers, each as the module or list that holds it, its key there, and its need; and lookup
            tables, each with an `OneRow` for it.
        context: number of tokens to plan for.
        dtype: dtype that the weights will have; None for their present dtypes.
        as_on_metal: whether to compute for Metal, wherever this runs.
        evaluated: modules whose results are evaluated at every call with a prompt.
        chunk: most tokens of a prompt in a call; None for PREFILL_TOKENS.

    Raises ValueError for a model that MLX cannot describe, and whatever the model raises.
    """
    from mlx.utils import tree_flatten

    here = mx.default_device() != mx.cpu
    drops_late = here or as_on_metal
    tokens = min(chunk or PREFILL_TOKENS, context)
    with stand_ins(layers) as calls:
        weights: Any = tree_flatten(model.parameters())
        try:
            with _fused_as_on_metal(as_on_metal and not here):
                token = _Step(model, calls, weights, 1, context, dtype)
                few = _Step(model, calls, weights, min(LOOPED_TOKENS, tokens), context, dtype, evaluated)
                loops = len(few.graph.makes) > 2 * len(token.graph.makes)
                whole = loops or tokens == few.tokens
                prompt = few if whole else _Step(model, calls, weights, tokens, context, dtype, evaluated)
        finally:
            model.load_weights(weights, strict=False)
    # Memory grows with the tokens at most in proportion.
    work = -(-(prompt.peak_bytes(drops_late, logits=False) - prompt.kv_bytes) * tokens // prompt.tokens)
    decoding = token.peak_bytes(drops_late, logits=True) - prompt.kv_bytes
    return Needs(
        prompt.kv_bytes + prompt.unused_kv_bytes,
        max(work, decoding),
        prompt.vocabulary,
        prompt.choices,
        prompt.state_bytes,
        decoding,
        prompt.layer_kv_bytes,
    )


@dataclass
class _Asked:
    """Arrays that are evaluated during a step. besides, answer: see `Evaluation`; no answer for a module's results."""

    arrays: tuple[mx.array, ...]
    besides: int = 0
    answer: mx.array | None = None


class _Calls:
    """What is evaluated during a step: the arguments of the streamed layers, and results of modules."""

    def __init__(self) -> None:
        self.begin([])

    def begin(self, answers: Sequence[mx.array]) -> None:
        """Starts a step. answers: the result of each call of a streamed layer; a call beyond them returns zeros."""
        self.asked: list[_Asked] = []
        self._answers = iter(answers)

    def answer(self, arrays: tuple[mx.array, ...], besides: int) -> mx.array:
        """The result of a call of a streamed layer, which evaluates `arrays`."""
        answer = next(self._answers, None)
        if answer is None:
            answer = mx.zeros(_answer_shape(*arrays), arrays[0].dtype)
        self.asked.append(_Asked(arrays, besides, answer))
        return answer

    def evaluate(self, arrays: Sequence[mx.array]) -> None:
        """Notes the results of a module, which evaluates them."""
        self.asked.append(_Asked(tuple(arrays)))


class _StandIn:
    """Takes the place of a streamed layer. Its arguments will be evaluated, and its result is new memory."""

    def __init__(self, calls: _Calls, need: StreamedNeed) -> None:
        self.calls, self.need = calls, need

    def __call__(self, x: mx.array, indices: mx.array | None = None, *rest: mx.array) -> mx.array:
        """rest: see `StreamedExperts`; they are small and not evaluated with the ids."""
        width = x.shape[-1]
        choices = 1 if indices is None else indices.shape[-1]
        besides = self.need(InputShape(x.size // width, width, x.dtype.size, choices))
        return self.calls.answer((x,) if indices is None else (x, indices), besides)


class OneRow:
    """Takes the place of a lookup table, and looks up its only row, all zeros, for every id.

    It reads nothing, even if the module evaluates what it looks up. An `OneRow` may stand for a layer's need in
    `needs_of` and `stand_ins`.
    """

    def __init__(self, module: nn.Module) -> None:
        self._small = copy.copy(module)
        for name, array in module.items():
            if isinstance(array, mx.array):
                self._small[name] = mx.zeros((1, *array.shape[1:]), array.dtype)

    def __call__(self, ids: mx.array) -> mx.array:
        result: mx.array = self._small(mx.zeros(ids.shape, ids.dtype))
        (depending,) = mx.depends([result], [ids])  # else it is a constant, which a trace takes apart no further
        return depending


@contextmanager
def stand_ins(layers: Sequence[tuple[Any, Any, StreamedNeed | OneRow]]) -> Iterator[_Calls]:
    """Inside this context, the streamed layers, in the form of `needs_of`, are stand-ins that note their arguments."""
    held = [parent[key] for parent, key, _ in layers]
    calls = _Calls()
    try:
        for parent, key, need in layers:
            parent[key] = need if isinstance(need, OneRow) else _StandIn(calls, need)
        yield calls
    finally:
        for (parent, key, _), module in zip(layers, held, strict=True):
            parent[key] = module


@contextmanager
def _noting(modules: Sequence[nn.Module], calls: _Calls) -> Iterator[None]:
    """Inside this context, every call of the modules notes its results."""
    hooked: list[nn.Module] = []
    try:
        for module in modules:
            hook(module, lambda: None, calls.evaluate)
            hooked.append(module)
        yield
    finally:
        for module in hooked:
            unhook(module)


class _Step:
    """The call of `tokens` tokens that fills the context."""

    def __init__(
        self,
        model: Any,
        calls: _Calls,
        weights: list[tuple[str, mx.array]],
        tokens: int,
        context: int,
        dtype: mx.Dtype | None,
        evaluated: Sequence[nn.Module] = (),
    ) -> None:
        self.tokens = tokens
        stand_ins = [_like(array, dtype) for _, array in weights]
        names = [name for name, _ in weights]
        model.load_weights(list(zip(names, stand_ins, strict=True)), strict=False)
        answers = _answers(model, calls, tokens)
        cache = _filled_cache(model, calls, context - tokens)
        before = [array for array, _ in _cache_arrays(cache)]

        def call(*arrays: mx.array) -> list[mx.array]:
            rest = iter(arrays)
            model.load_weights([(name, next(rest)) for name in names], strict=False)
            for _, put in _cache_arrays(cache):
                put(next(rest))
            calls.begin([next(rest) for _ in answers])
            with _noting(evaluated, calls):
                logits = model(next(rest), cache=cache)
            asked = [array for one in calls.asked for array in one.arrays]
            return [*asked, *(array for array, _ in _cache_arrays(cache)), logits[:, -1]]

        self.graph = trace(call, *stand_ins, *before, *answers, mx.zeros((1, tokens), mx.int32))
        answered = [one for one in calls.asked if one.answer is not None]
        self.choices = max((one.arrays[-1].shape[-1] for one in answered if len(one.arrays) > 1), default=1)
        inputs = self.graph.inputs[len(names) : -1]
        self.before, brought = inputs[: len(before)], iter(inputs[len(before) :])
        outputs = iter(self.graph.outputs)
        self.evaluations = []
        for one in calls.asked:
            names_asked = [next(outputs).name for _ in one.arrays]
            brings = [] if one.answer is None else [next(brought)]
            self.evaluations.append(Evaluation(names_asked, one.besides, brings))
        *self.after, self.logits = outputs
        growing = {id(array) for part in parts_of(cache) if _grows(part) for array, _ in _arrays_of(part)}
        self.grows = [id(array) in growing for array, _ in _cache_arrays(cache)]
        places = iter(range(len(self.after)))
        # Indices into `after`, by layer.
        self.layers = [[next(places) for _ in _cache_arrays([layer])] for layer in cache]

    @property
    def kv_bytes(self) -> int:
        return sum(array.nbytes for array in self.after)

    @property
    def unused_kv_bytes(self) -> int:
        """Bytes of the last step of a growing cache, beyond the end of the context, which were not in this call."""
        grown = (array for array, grows in zip(self.after, self.grows, strict=True) if grows)
        return sum(array.nbytes // array.shape[2] * (-array.shape[2] % KV_STEP_TOKENS) for array in grown)

    @property
    def layer_kv_bytes(self) -> int:
        """Bytes of the layer whose cache is the largest, to the end of its last step."""
        sizes = [round_up(a.shape[2], KV_STEP_TOKENS) * a.nbytes // a.shape[2] if grows else a.nbytes
                 for a, grows in zip(self.after, self.grows, strict=True)]  # fmt: skip
        return max((sum(sizes[at] for at in layer) for layer in self.layers), default=0)

    @property
    def state_bytes(self) -> int:
        return sum(array.nbytes for array, grows in zip(self.after, self.grows, strict=True) if not grows)

    @property
    def vocabulary(self) -> int:
        return self.logits.shape[-1]

    def peak_bytes(self, drops_late: bool, logits: bool) -> int:
        """Peak bytes of the step, with the prompt cache. logits: whether they are computed, as for a prompt's end."""
        evaluations = list(self.evaluations)
        last = [array.name for array in self.after]
        if logits:
            evaluations.append(Evaluation([*last, self.logits.name], LOGITS_COPIES * 4 * self.vocabulary))
        else:
            evaluations.append(Evaluation(last))
        return peak_bytes(self.graph, evaluations, self.before, drops_late)


def _like(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """An array of the same shape, never evaluated. dtype: the dtype if `array` is floating; None to keep it."""
    same = dtype is None or not mx.issubdtype(array.dtype, mx.floating)
    return mx.zeros(array.shape, array.dtype if same else dtype)


def _answers(model: Any, calls: _Calls, tokens: int) -> list[mx.array]:
    """Arrays like those that the streamed layers return when the model is called with `tokens` tokens."""
    from mlx_lm.models.cache import make_prompt_cache

    calls.begin([])
    model(mx.zeros((1, tokens), mx.int32), cache=make_prompt_cache(model))
    return [mx.zeros(_answer_shape(*one.arrays), one.arrays[0].dtype) for one in calls.asked]


def _answer_shape(x: mx.array, indices: mx.array | None = None) -> tuple[int, ...]:
    return x.shape if indices is None else (*indices.shape, x.shape[-1])


def _filled_cache(model: Any, calls: _Calls, tokens: int) -> list[Any]:
    """A prompt cache as it is after `tokens` tokens. Nothing in it is evaluated."""
    from mlx_lm.models.cache import make_prompt_cache

    cache: list[Any] = make_prompt_cache(model)
    parts = parts_of(cache)
    # A cache with a window keeps its size once the window is full. A cache that keeps all tokens is enlarged below.
    window = max((_window(part) or 1 for part in parts), default=1)
    filled = 0

    def fill(upto: int) -> None:
        nonlocal filled
        while filled < upto:
            calls.begin([])
            piece = min(PREFILL_TOKENS, upto - filled)
            model(mx.zeros((1, piece), mx.int32), cache=cache)
            filled += piece

    few = round_up(window, PREFILL_TOKENS) + PREFILL_TOKENS
    standard = all(type(part).__module__ == STANDARD_CACHES for part in parts)
    if not standard and tokens > few + PREFILL_TOKENS:
        fill(few)
        counts, shapes = [counts_of(part) for part in parts], [[a.shape for a, _ in _arrays_of(part)] for part in parts]
        fill(few + PREFILL_TOKENS)
        enlarge(parts, _arrays_of, counts, shapes, (few, filled, tokens))
        return cache
    fill(min(tokens, round_up(window, PREFILL_TOKENS)) if standard else tokens)
    for part in parts:
        if _grows(part):
            for array, put in _arrays_of(part):
                put(mx.zeros((*array.shape[:2], round_up(tokens, KV_STEP_TOKENS), *array.shape[3:]), array.dtype))
            part.offset = tokens
    return cache


def _grows(part: Any) -> bool:
    """Whether a part of a prompt cache keeps keys and values (B, heads, tokens, width) of every token.

    Those of a quantised cache are each three arrays of this form.
    """
    kept = getattr(part, "keys", None) is not None and hasattr(part, "offset") and _window(part) is None
    arrays = _arrays_of(part) if kept else []
    return bool(arrays) and all(array.ndim == 4 for array, _ in arrays)


def _window(part: Any) -> int | None:
    """How many tokens a part of a prompt cache keeps; None for all."""
    return getattr(part, "max_size", None) or getattr(part, "chunk_size", None)


def _cache_arrays(cache: list[Any]) -> list[tuple[mx.array, Callable[[mx.array], None]]]:
    """Every array in a prompt cache, with a function that replaces it."""
    return [found for part in parts_of(cache) for found in _arrays_of(part)]


def _arrays_of(part: Any) -> list[tuple[mx.array, Callable[[mx.array], None]]]:
    """Every array in a part of a prompt cache, with a function that replaces it."""
    found: list[tuple[mx.array, Callable[[mx.array], None]]] = []
    for name, value in vars(part).items():
        if isinstance(value, mx.array):
            found.append((value, partial(setattr, part, name)))
            continue
        if isinstance(value, tuple):
            value = list(value)
            setattr(part, name, value)  # items of a list can be replaced
        if isinstance(value, list):
            places = [place for place, item in enumerate(value) if isinstance(item, mx.array)]
            found += [(value[place], partial(value.__setitem__, place)) for place in places]
    return found


@contextmanager
def _fused_as_on_metal(wanted: bool) -> Iterator[None]:
    """Inside this context, attention is one operation wherever MLX fuses it on Metal."""
    real = mx.fast.scaled_dot_product_attention

    def attention(q: mx.array, k: mx.array, v: mx.array, *rest: Any, **options: Any) -> mx.array:
        """q: (B, H, T, D) -> (B, H, T, D of v)"""
        if q.shape[2] > 8 and not (q.shape[-1] == v.shape[-1] and q.shape[-1] in FUSED_HEAD_DIMS):
            return real(q, k, v, *rest, **options)
        column = q[..., :1] + k[:, :1, :1, :1] + v[:, :1, :1, :1]
        return mx.concatenate([column] * v.shape[-1], axis=-1)

    if wanted:
        mx.fast.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = real  # type: ignore[assignment]
