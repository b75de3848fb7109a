"""Streamed models against the dense one, and against themselves with every kind of caching and reading."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import (  # type: ignore[import-not-found]
    DTYPES,
    GOLDEN,
    GOLDEN_VARIANTS,
    PREDICTORS,
    QUANTISED,
    Tiny,
    change_manifest,
)
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache
from slow_cases import others  # type: ignore[import-not-found]

from mlx_flash.errors import ReadError
from mlx_flash.layers.lookahead import GUESS_AGAIN, LookAhead

pytestmark = pytest.mark.usefixtures("one_processor")

TOLERANCE = 1e-4  # logits have a standard deviation above 1
PROMPT = [5, 17, 80, 3, 44, 61, 9, 9, 30, 72, 1, 55]  # longer than a call on the decode path
GREEDY_PROMPTS = ([5], PROMPT)
GREEDY_TOKENS = 12
GOLDEN_GREEDY_TOKENS = 4  # the families differ in the computation of a call, not in how tokens follow each other
BATCH = [[7, 50, 21, 64, 2, 11, 90, 33, 76, 18, 29], [40, 8, 62, 13, 95, 27, 4, 71, 16, 38, 59]]

# Every predictor with every packing, and both 16-bit dtypes, on which products and reads depend. A family is an
# activation, a bias and a number of parts. To those the low-rank and the shadow predictor are the same: a mask. So each
# family meets "exact" in CASES, and one of the two in CASES_OF_A_FEW. "none" computes like a prompt. It is compared
# with the dense model for every family, also with a few slots and with a few tokens at once.
CASES = [
    *((name, predictor) for name in ("float32", "4 bits") for predictor in PREDICTORS),
    *(("gated 8 bits", "exact"), ("gated 8 bits", "shadow"), ("float16", "lowrank"), ("bfloat16", "exact")),
    *((name, "exact") for name in GOLDEN_VARIANTS),
]
SLOW_CASES = [
    *((name, predictor) for name in (*DTYPES, *QUANTISED) for predictor in PREDICTORS),
    *zip(GOLDEN_VARIANTS, itertools.cycle(("lowrank", "shadow")), strict=False),
]
CASES_OF_A_FEW = [
    *((name, predictor) for name in ("float32", "bfloat16", *QUANTISED) for predictor in PREDICTORS),
    *((name, "exact") for name in GOLDEN_VARIANTS),
    *zip(GOLDEN_VARIANTS, itertools.cycle(("shadow", "lowrank")), strict=False),
]


def greedy(model: Any, prompt: list[int], tokens: int) -> tuple[list[int], list[np.ndarray]]:
    """Runs a prompt in one call, then token by token. Returns the ids and the logits (V,) that each was chosen by."""
    cache = make_prompt_cache(model)
    ids: list[int] = []
    logits = []
    call = [token % model.args.vocab_size for token in prompt]
    for _ in range(tokens):
        logits.append(np.array(model(mx.array([call]), cache)[0, -1]))
        call = [int(logits[-1].argmax())]
        ids += call
    return ids, logits


def everything(model: Any) -> list[np.ndarray]:
    """Logits of calls of every form: a prompt, tokens, a few at once, and batches of prompts, tokens and a few."""
    cache = make_prompt_cache(model)
    vocab = model.args.vocab_size
    calls = [PROMPT, [4], [9], [77, 31], [12, 4, 50, 63, 29, 85, 1, 36], [9], [10, 10, 10, 10, 10]]
    results = [np.array(model(mx.array([call]) % vocab, cache)) for call in calls]
    batch = [BatchKVCache([0, 0]) for _ in model.layers]
    for begin, end in [(0, 9), (9, 10)]:
        results.append(np.array(model(mx.array(BATCH)[:, begin:end] % vocab, batch)))
    results.append(np.array(model(mx.array(BATCH)[:, :6] % vocab)))
    results.append(np.array(model(mx.array([[8]]))))
    return results


def assert_same(found: list[np.ndarray], expected: list[np.ndarray], what: object) -> None:
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert np.array_equal(a, b), (what, i)


@dataclass(frozen=True)
class Dense:
    """Results of a store's plain model: `everything`, and `greedy` for each of GREEDY_PROMPTS."""

    everything: list[np.ndarray]
    greedy: list[tuple[list[int], list[np.ndarray]]]


@pytest.fixture(scope="module")
def dense_of(tiny_of: Callable[[str], Tiny]) -> Callable[[str], Dense]:
    @functools.cache
    def make(name: str) -> Dense:
        model = tiny_of(name).dense
        tokens = GOLDEN_GREEDY_TOKENS if name in GOLDEN_VARIANTS else GREEDY_TOKENS
        return Dense(everything(model), [greedy(model, prompt, tokens) for prompt in GREEDY_PROMPTS])

    return make


Resident = tuple[list[np.ndarray], int]


@pytest.fixture(scope="module")
def residents() -> dict[tuple[str, str], Resident]:
    return {}


@pytest.fixture
def resident_of(
    residents: dict[tuple[str, str], Resident], tiny_of: Callable[[str], Tiny], open_model: Callable[..., Any]
) -> Callable[[str, str], Resident]:
    """(store, predictor) -> `everything` with all neurons in memory, and the misses until they are there."""

    def make(name: str, predictor: str) -> Resident:
        if (name, predictor) not in residents:
            model = open_model(tiny_of(name).store, predictor=predictor)
            expected = everything(model)
            misses = model.flash.streamer.counters.misses
            if name in ("float32", *QUANTISED):  # the others keep the same things
                assert_same(everything(model), expected, "again, all resident")
            residents[name, predictor] = expected, misses
        return residents[name, predictor]

    return make


@pytest.mark.parametrize(("name", "predictor"), others([*CASES, *SLOW_CASES], CASES))
def test_bit_identical_however_it_is_cached_and_read(
    tiny_of: Callable[[str], Tiny], open_model: Callable[..., Any], resident_of: Any, name: str, predictor: str
) -> None:
    tiny = tiny_of(name)
    blocks = tiny.manifest.layout.blocks
    expected, misses = resident_of(name, predictor)
    smallest = 0 if predictor == "none" else max(1, blocks // 64)
    ways: list[dict[str, Any]] = [
        {"slots": smallest, "threads": 1},
        {"slots": blocks // 3, "window": 8, "threads": 2},
        {"slots": 2, "io": "buffered", "window": 1},
        {"slots": blocks - 1},
    ]
    # The ways of reading do not depend on the dtype, and the two 16-bit dtypes share a layout. The golden models have 5
    # blocks, so the second way is enough.
    if name != "float32":
        ways = ways[1:2] if name in (*GOLDEN_VARIANTS, "bfloat16") else ways[:1] if name == "float16" else ways[:2]
    for way in ways:
        model = open_model(tiny.store, predictor=predictor, **way)
        assert_same(everything(model), expected, way)
        assert model.flash.streamer.counters.misses > misses
        model.flash.close()


# Only 60 slots have room for a guess of these small blocks, except for an empty guess. With fewer, none is read.
@pytest.mark.parametrize(
    ("guess", "slots"),
    [
        *((guess, 60) for guess in ("good", "random", "nothing", "everything", "raises")),
        *((guess, 20) for guess in ("good", "nothing", "raises")),
        *((guess, 2) for guess in ("good", "everything")),
    ],
)
def test_look_ahead_never_changes_the_text(
    tiny: Tiny,
    open_model: Callable[..., Any],
    resident_of: Any,
    monkeypatch: pytest.MonkeyPatch,
    slots: int,
    guess: str,
) -> None:
    expected, _ = resident_of("float32", "lowrank")
    model = open_model(tiny.store, slots=slots, predictor="lowrank")
    rng = np.random.default_rng(0)
    shares = {"random": 0.1, "nothing": 0.0, "everything": 1.0}

    def guessed(self: LookAhead, x: mx.array) -> mx.array:
        if guess == "raises":
            raise KeyboardInterrupt
        return mx.array(rng.random((len(x), tiny.manifest.layout.neurons)) < shares[guess])

    if guess != "good":
        monkeypatch.setattr(LookAhead, "guess", guessed)
    if guess == "raises":
        with pytest.raises(KeyboardInterrupt):
            everything(model)
        monkeypatch.undo()
    assert_same(everything(model), expected, guess)
    assert_same(everything(model), expected, guess)
    counters = model.flash.streamer.counters
    if slots == 60:  # with fewer slots, guesses of these small blocks do not fit
        assert counters.prefetched_used > 0 or guess not in ("good", "raises")
        assert counters.prefetched_used == counters.prefetched_unused == 0 or guess not in ("nothing", "everything")
    assert counters.prefetched_used <= counters.misses


def test_a_layer_that_guesses_badly_stops_and_tries_again(tiny: Tiny, open_model: Callable[..., Any]) -> None:
    model = open_model(tiny.store, slots=60, predictor="lowrank")
    ahead = model.layers[0].mlp.ahead
    x = mx.zeros((1, 64))
    assert ahead.guess(x) is not None
    ahead.units.prefetched.unused = 5.0
    asked = [ahead.guess(x) is not None for _ in range(2 * GUESS_AGAIN)]
    assert [i for i, was in enumerate(asked) if was] == [GUESS_AGAIN - 1, 2 * GUESS_AGAIN - 1]
    ahead.units.prefetched.used = 6.0
    assert ahead.guess(x) is not None


@pytest.mark.parametrize("predictor", ["none", "exact"])
@pytest.mark.parametrize("name", [*DTYPES, *GOLDEN_VARIANTS, *QUANTISED])
def test_without_a_guess_it_is_the_dense_model(
    tiny_of: Callable[[str], Tiny],
    open_model: Callable[..., Any],
    resident_of: Any,
    dense_of: Callable[[str], Dense],
    name: str,
    predictor: str,
) -> None:
    """For CASES, another test shows that fewer slots give the same bits as all neurons in memory."""
    dense = dense_of(name)
    model = open_model(tiny_of(name).store, slots=3, predictor=predictor)
    logits = resident_of(name, predictor)[0] if (name, predictor) in CASES else everything(model)
    for found, expected in zip(logits, dense.everything, strict=True):
        assert np.abs(found - expected).max() < TOLERANCE
    for prompt, (dense_ids, dense_logits) in zip(GREEDY_PROMPTS, dense.greedy, strict=True):
        ids, logits = greedy(model, prompt, len(dense_ids))
        assert ids == dense_ids
        assert np.abs(np.stack(logits) - np.stack(dense_logits)).max() < TOLERANCE
    if name in DTYPES:
        assert len(set(ids)) > 5  # the text must not repeat itself, or the test would show little


@pytest.mark.parametrize("predictor", ["none", "exact"])
@pytest.mark.parametrize("variant", GOLDEN_VARIANTS)
def test_logits_agree_with_transformers(
    tiny_of: Callable[[str], Tiny], open_model: Callable[..., Any], variant: str, predictor: str
) -> None:
    with np.load(GOLDEN / variant / "golden.npz") as golden:
        tokens, expected = mx.array(golden["tokens"]), golden["logits"]
    model = open_model(tiny_of(variant).store, slots=4, predictor=predictor)
    assert np.abs(np.array(model(tokens)) - expected).max() < TOLERANCE
    assert np.abs(np.array(model(tokens[:, :7])) - expected[:, :7]).max() < TOLERANCE


@pytest.mark.parametrize(("name", "predictor"), CASES_OF_A_FEW)
def test_a_few_tokens_at_once_equal_token_by_token(
    tiny_of: Callable[[str], Tiny], open_model: Callable[..., Any], name: str, predictor: str
) -> None:
    """Each position computes with its own neurons, although the union of them is read."""
    model = open_model(tiny_of(name).store, slots=6, predictor=predictor)
    tokens = mx.array([PROMPT[:3], BATCH[0][:3]]) % model.args.vocab_size
    together = np.array(model(tokens[:1]))
    both = np.array(model(tokens))
    for row in range(2):
        cache = make_prompt_cache(model)
        single = np.concatenate([np.array(model(tokens[row : row + 1, i : i + 1], cache)) for i in range(3)], axis=1)
        assert np.abs(both[row] - single[0]).max() < TOLERANCE
        if row == 0:
            assert np.abs(together - single).max() < TOLERANCE


@pytest.mark.parametrize("predictor", ["lowrank", "shadow"])
def test_a_predictor_leaves_neurons_out(tiny: Tiny, open_model: Callable[..., Any], predictor: str) -> None:
    """Shows that the tests above involve a selection: it changes the logits a little and reads less."""
    model = open_model(tiny.store, slots=1, predictor=predictor)
    found, dense = (np.array(m(mx.array([[5], [17], [80]]))) for m in (model, tiny.dense))
    assert 1e-3 < np.abs(found - dense).max() < 0.5 * dense.std()
    mask, _ = model.layers[0].mlp.predictor(mx.random.normal((50, 64), key=mx.random.key(0)))
    assert 0.1 < np.array(mask).mean() < 0.6


def test_exact_chooses_the_positive_neurons_and_nothing_else(tiny: Tiny, open_model: Callable[..., Any]) -> None:
    model = open_model(tiny.store, predictor="exact")
    x = mx.random.normal((9, 64), key=mx.random.key(1))
    for index, layer in enumerate(model.layers):
        mask, before = layer.mlp.predictor(x)
        expected = np.array(tiny.dense.layers[index].mlp.fc1(x))
        assert np.abs(np.array(before) - expected).max() < 1e-5
        assert np.array_equal(np.array(mask), np.array(before) > 0)
        assert np.array_equal(np.array(layer.mlp.predictor.matrix), tiny.rows[index, 0])


def test_nothing_chosen_is_only_the_bias(tiny: Tiny, open_model: Callable[..., Any]) -> None:
    mlp = open_model(tiny.store, predictor="lowrank").layers[0].mlp
    mlp.predictor.c = mx.full(mlp.predictor.c.shape, -1e9)
    x = mx.random.normal((2, 1, 64), key=mx.random.key(2))
    before = mlp.units.shared.counters.copy()
    y = mlp(x)
    assert mx.array_equal(y, mx.broadcast_to(mlp.down_bias, y.shape))
    assert (mlp.units.shared.counters - before).bytes == 0


@pytest.mark.parametrize("predictor", ["lowrank", "shadow"])
def test_layers_marked_dense_use_all_neurons(
    tiny: Tiny, own_store: Any, open_model: Callable[..., Any], predictor: str
) -> None:
    """Layer 1 is marked. Layer 0 selects as before, and layer 1 computes like the dense layer."""
    change_manifest(own_store, all_neurons_layers=(1,))
    selecting, marked = (open_model(s, slots=4, predictor=predictor) for s in (tiny.store, own_store))
    x = mx.random.normal((1, 3, 64), key=mx.random.key(3))
    assert mx.array_equal(marked.layers[0].mlp(x), selecting.layers[0].mlp(x))
    dense = tiny.dense.layers[1].mlp(x)
    assert np.abs(np.array(marked.layers[1].mlp(x) - dense)).max() < 1e-5
    careless = selecting.layers[1].mlp
    careless.predictor.c = careless.predictor.c - 1.0  # misses enough neurons to be noticed
    assert np.abs(np.array(careless(x) - dense)).max() > 1e-4
    assert_same(everything(marked), everything(open_model(own_store, predictor=predictor)), "with a layer marked dense")


def test_calls_longer_than_the_bound_are_exact(tiny: Tiny, own_store: Any, open_model: Callable[..., Any]) -> None:
    change_manifest(own_store, decode_tokens=3)
    model = open_model(own_store, slots=4, predictor="shadow")
    difference = [
        np.abs(np.array(model(mx.array([PROMPT[:n]]))) - np.array(tiny.dense(mx.array([PROMPT[:n]])))).max()
        for n in (3, 4, 12)
    ]
    assert difference[0] > 1e-3
    assert max(difference[1:]) < TOLERANCE


# With 1 slot of 64, a token's rows are copied out of it. 56 slots hold the whole token: its graph reads the rows there,
# and the next token overwrites some.
@pytest.mark.parametrize("predictor", ["exact", "lowrank", "shadow"])
@pytest.mark.parametrize("slots", [1, 56])
def test_logits_evaluated_after_the_next_call_are_right(
    tiny: Tiny, open_model: Callable[..., Any], predictor: str, slots: int
) -> None:
    """mlx-lm starts a call before it has evaluated the last one. The first call's rows must not be overwritten."""
    reference = open_model(tiny.store, predictor=predictor)
    expected = [np.array(reference(mx.array([[token]]))) for token in (5, 17, 80, 3)]
    model = open_model(tiny.store, slots=slots, predictor=predictor)
    lazy = [model(mx.array([[token]])) for token in (5, 17, 80, 3)]
    model(mx.array([PROMPT]))
    assert_same([np.array(logits) for logits in lazy], expected, predictor)
    assert model.flash.streamer.counters.misses > 2 * slots, "slots were written again"

    asynchronous = []
    for token in (5, 17, 80, 3):
        asynchronous.append(model(mx.array([[token]])))
        mx.async_eval(asynchronous[-1])
    assert_same([np.array(logits) for logits in asynchronous], expected, predictor)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_another_thread_may_generate(
    tiny: Tiny, open_model: Callable[..., Any], resident_of: Any, predictor: str
) -> None:
    """Servers load in one thread and generate in another."""
    expected, _ = resident_of("float32", predictor)
    model = open_model(tiny.store, slots=5, predictor=predictor)
    results: list[Any] = []

    def work() -> None:
        try:
            results.extend(everything(model))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_same(results, expected, predictor)


@pytest.mark.parametrize(
    ("predictor", "which"), [("none", (0, 12)), ("exact", (1, 3)), ("lowrank", (0, 3)), ("shadow", (1, 12))]
)
def test_a_read_error_ends_the_call_and_the_next_one_is_right(
    tiny: Tiny,
    open_model: Callable[..., Any],
    resident_of: Any,
    monkeypatch: pytest.MonkeyPatch,
    predictor: str,
    which: tuple[int, ...],
) -> None:
    expected, _ = resident_of("float32", predictor)
    model = open_model(tiny.store, slots=5, predictor=predictor)
    reader = model.flash.streamer.reader
    real, errors = reader.wait, []
    for failing in which:
        waits = 0

        def wait(ticket: Any, failing: int = failing) -> Any:
            nonlocal waits
            waits += 1
            report = real(ticket)
            if waits - 1 == failing:
                raise ReadError("injected")
            return report

        monkeypatch.setattr(reader, "wait", wait)
        with pytest.raises(ReadError, match="injected") as caught:
            everything(model)
        errors.append(caught)  # with its traceback, as an interactive session keeps it
        monkeypatch.setattr(reader, "wait", real)
        assert not reader.outstanding
        assert_same(everything(model), expected, failing)


def test_an_interrupted_pass_leaves_no_read_in_flight(
    tiny: Tiny, open_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(tiny.store, slots=0, predictor="none")
    reader = model.flash.streamer.reader

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_flash.layers.neurons.mx.maximum", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        model(mx.array([[5]]))
    monkeypatch.undo()
    assert caught.tb is not None and not reader.outstanding
