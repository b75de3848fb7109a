"""The slots' book-keeping against a model made of dictionaries."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlx_flash.flash.slot_cache import HALF_LIFE, EventLog, SlotCache


def ids(*units: int) -> np.ndarray:
    return np.array(units, np.int64)


def put(cache: SlotCache, *units: int) -> tuple[list[int], list[int]]:
    """Serves one token that needs `units`, without failed reads. Returns the units that were read and their slots."""
    cache.mark_used(ids(*units))
    missing, slots = cache.reserve(ids(*units))
    cache.commit(missing, slots)
    return missing.tolist(), slots.tolist()


class CacheMachine(RuleBasedStateMachine):
    """The naive model: the unit in each slot, the last use of each unit, and the pending reads."""

    @initialize(units=st.integers(1, 12), slots=st.integers(0, 14), window=st.none() | st.integers(1, 4))
    def create(self, units: int, slots: int, window: int | None) -> None:
        self.cache = SlotCache(units, slots, window)
        self.units, self.slots, self.window = units, min(units, slots), window
        self.place: dict[int, int] = {}
        self.used: dict[int, int] = {}
        self.uses: dict[int, list[int]] = {}
        self.clock = 0
        self.underway: dict[int, int] = {}

    def some(self, data: st.DataObject, most: int) -> np.ndarray:
        chosen = data.draw(st.lists(st.integers(0, self.units - 1), unique=True, max_size=most))
        return np.array(sorted(chosen), np.int64)

    @precondition(lambda self: not self.underway)
    @rule(data=st.data())
    def tick(self, data: st.DataObject) -> None:
        wanted = self.some(data, self.units)
        self.clock += 1
        here = [u for u in wanted.tolist() if u in self.place]
        self.used |= dict.fromkeys(here, self.clock)
        for unit in wanted.tolist():
            self.uses.setdefault(unit, []).append(self.clock)
        assert self.cache.mark_used(wanted) == len(here)

    def score(self, unit: int) -> float:
        return sum(2 ** ((use - self.clock) / HALF_LIFE) for use in self.uses.get(unit, []))

    @precondition(lambda self: not self.underway)
    @rule(data=st.data())
    def reserve(self, data: st.DataObject) -> None:
        wanted = self.some(data, self.slots)
        missing, targets = self.cache.reserve(wanted)
        expected = [u for u in wanted.tolist() if u not in self.place]
        assert missing.tolist() == expected
        assert len(targets) == len(expected) == len(set(targets.tolist()))

        in_slot = {slot: unit for unit, slot in self.place.items()}
        free = [slot for slot in range(self.slots) if slot not in in_slot]
        taken = free[: len(expected)]
        candidates = {slot: unit for unit, slot in self.place.items() if unit not in wanted}
        if self.window is None:  # slots with equal scores may be evicted in any order
            victims = [slot for slot in targets.tolist() if slot in in_slot]
            assert {*victims} <= {*candidates}
            gone = [self.score(candidates[slot]) for slot in victims]
            kept = [self.score(unit) for slot, unit in candidates.items() if slot not in victims]
            assert max(gone, default=0) <= min(kept, default=float("inf")) * (1 + 1e-5)
        else:
            oldest = self.clock - self.window
            order = sorted((max(self.used[unit], oldest), slot) for slot, unit in candidates.items())
            victims = [slot for _, slot in order[: len(expected) - len(taken)]]
        assert targets.tolist() == sorted(taken + victims)
        for slot in victims:
            unit = in_slot[slot]
            del self.place[unit], self.used[unit]
        self.underway = dict(zip(missing.tolist(), targets.tolist(), strict=True))

    @precondition(lambda self: self.underway)
    @rule(succeeds=st.booleans())
    def finish(self, succeeds: bool) -> None:
        if succeeds:
            self.cache.commit(np.array([*self.underway]), np.array([*self.underway.values()]))
            self.place |= self.underway
            self.used |= dict.fromkeys(self.underway, self.clock)
        self.underway = {}

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "cache"):
            return
        assert {u: s for u, s in enumerate(self.cache.slot_of.tolist()) if s >= 0} == self.place
        assert {u: s for s, u in enumerate(self.cache.unit_of.tolist()) if u >= 0} == self.place
        assert self.cache.resident == len(self.place) == len(set(self.place.values()))
        assert self.cache.free == self.slots - len(self.place)


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)


def test_free_slots_are_filled_first_in_order() -> None:
    cache = SlotCache(10, 4)
    assert put(cache, 7, 9) == ([7, 9], [0, 1])
    assert put(cache, 3) == ([3], [2])
    assert put(cache, 3, 9) == ([], [])
    assert put(cache, 0, 9) == ([0], [3])
    assert cache.free == 0


def test_of_equally_often_used_units_the_least_recent_goes() -> None:
    cache = SlotCache(10, 3)
    for unit in (0, 1, 2, 0):
        put(cache, unit)
    assert put(cache, 5) == ([5], [1])
    assert put(cache, 6) == ([6], [2])
    assert put(cache, 7) == ([7], [1])


def test_use_counts_until_it_has_faded() -> None:
    cache = SlotCache(10, 2)
    for unit in (0, 0, 0, 1):
        put(cache, unit)
    assert put(cache, 2) == ([2], [1])  # 1 is more recent, but 0 was used more
    for _ in range(3 * HALF_LIFE):
        put(cache, 2)
    assert put(cache, 3) == ([3], [0])


def test_a_unit_that_comes_back_is_remembered() -> None:
    cache = SlotCache(10, 1)
    for unit in (0, 0, 1, 0):
        put(cache, unit)
    assert cache.score[0] > 2.5 * cache.score[1]


def test_scores_do_not_overflow() -> None:
    cache = SlotCache(4, 2)
    put(cache, 0, 1)
    for _ in range(200 * HALF_LIFE):  # 2 ** 200 is not a float32
        cache.mark_used(ids(1))
    assert np.isfinite(cache.score).all() and cache.score[1] > cache.score[0] >= 0
    assert put(cache, 3) == ([3], [0])


@settings(max_examples=100, deadline=None)
@given(data=st.data(), units=st.integers(1, 12), window=st.none() | st.integers(1, 3))
def test_looking_up_is_marking_use_and_finding_slots(data: st.DataObject, units: int, window: int | None) -> None:
    slots = data.draw(st.integers(0, units))
    plain, quick = SlotCache(units, slots, window), SlotCache(units, slots, window)
    plain.use_weight = quick.use_weight = data.draw(st.sampled_from([1.0, 9.9e29]))
    for cache in (plain, quick):
        cache.event_log = EventLog()
    for _ in range(data.draw(st.integers(1, 12))):
        call = np.array(data.draw(st.lists(st.integers(0, units - 1), min_size=1, max_size=6)), np.uint32)
        needed = np.unique(call)[:slots]
        call = call[np.isin(call, needed)].reshape(1, -1)
        for cache in (plain, quick):
            before = cache.slot_of.copy()
            found = cache.look_up(call) if cache is quick else None
            if found is not None:
                assert window is None
                assert found[0].tolist() == before[call].tolist() and found[1] == len(needed)
            else:
                cache.mark_used(needed)
                cache.commit(*cache.reserve(needed))
        for name in ("slot_of", "unit_of", "score", "last_used"):
            assert np.array_equal(getattr(plain, name), getattr(quick, name)), name
        assert (plain.use_weight, plain.clock, plain.resident) == (quick.use_weight, quick.clock, quick.resident)
    logs = [[each.tolist() for each in cache.event_log.used] for cache in (plain, quick) if cache.event_log]
    assert logs[0] == logs[1]


def test_ids_that_no_layer_has_are_not_looked_up() -> None:
    cache = SlotCache(3, 3)
    put(cache, 0, 1, 2)
    scores = cache.score.copy()
    for wrong in (ids(0, 3), ids(-1, 1), ids(2**32 - 1)):
        assert cache.look_up(wrong) is None
    assert cache.clock == 1 and np.array_equal(cache.score, scores)
    assert cache.look_up(ids(2, 0, 2)) is not None and cache.clock == 2


def test_a_window_keeps_its_last_tokens_and_takes_the_others_in_slot_order() -> None:
    history = [0, 1, 2, 0]  # last use by slot: token 4, token 2, token 3
    endless, short = SlotCache(10, 3, window=10**6), SlotCache(10, 3, window=1)
    for unit in history:
        put(endless, unit)
        put(short, unit)
    assert put(endless, 5)[1] == [1]  # least-recent use
    assert put(short, 5)[1] == [0]  # token 5 has begun, so the window holds none of the others
    wide = SlotCache(10, 3, window=2)
    for unit in history:
        put(wide, unit)
    assert put(wide, 5)[1] == [1]  # the window holds tokens 4 and 5, so unit 0 stays


def test_needed_units_stay_even_if_they_are_the_oldest() -> None:
    cache = SlotCache(10, 3)
    for unit in (0, 1, 2):
        put(cache, unit)
    assert put(cache, 0, 1, 9) == ([9], [2])


@pytest.mark.parametrize("slots", [-1, float("nan")])
def test_slots_must_make_sense(slots: Any) -> None:
    with pytest.raises(ValueError, match="slots >= 0"):
        SlotCache(4, slots)


def test_more_slots_than_units_are_no_use() -> None:
    cache = SlotCache(3, 10)
    assert (cache.slots, cache.free) == (3, 3)
    put(cache, 0, 1, 2)
    assert (cache.slots, cache.free) == (3, 0)


def test_an_interrupted_commit_claims_nothing() -> None:
    class Interrupting(np.ndarray):
        def __setitem__(self, *_: object) -> None:
            raise KeyboardInterrupt

    for field in ("unit_of", "last_used", "slot_of"):
        cache = SlotCache(6, 3)
        missing, slots = cache.reserve(np.array([1, 4]))
        kept = getattr(cache, field)
        setattr(cache, field, kept.view(Interrupting))
        with pytest.raises(KeyboardInterrupt):
            cache.commit(missing, slots)
        setattr(cache, field, kept)
        assert (cache.slot_of == -1).all() and cache.resident == 0, field
        units = np.array([0, 1, 5])
        cache.mark_used(units)
        cache.commit(*cache.reserve(units))
        assert (cache.unit_of[cache.slot_of[units]] == units).all()


@pytest.mark.parametrize("done", [False, True])
def test_an_interrupted_eviction_claims_nothing(done: bool) -> None:
    cache = SlotCache(6, 3)
    put(cache, 2, 3, 5)
    functions = cache._c

    def interrupted(*arguments: Any) -> None:
        if done:
            functions.mf_make_room(*arguments)
        raise KeyboardInterrupt

    cache._c = SimpleNamespace(mf_make_room=interrupted)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        cache.reserve(ids(1, 5))
    cache._c = functions
    assert cache.resident <= np.count_nonzero(cache.unit_of >= 0) == 3 - done
    put(cache, 0, 1, 5)
    assert sorted(cache.unit_of.tolist()) == [0, 1, 5] and cache.resident == 3
    assert np.flatnonzero(cache.slot_of >= 0).tolist() == [0, 1, 5]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), units=st.integers(1, 120), window=st.none() | st.integers(1, 5))
def test_victims_are_those_of_a_sort_by_score(data: st.DataObject, units: int, window: int | None) -> None:
    slots = data.draw(st.integers(1, units))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    cache = SlotCache(units, slots, window)
    held = rng.permutation(units)[: rng.integers(0, slots + 1)]
    places = rng.permutation(slots)[: len(held)]
    cache.clock = 9
    cache.commit(held, places)
    cache.score[:] = rng.choice([0, 0.5, 1, 2.25, 1e29], units)  # many are equal
    cache.last_used[:] = rng.integers(0, 10, slots)
    wanted = np.sort(rng.permutation(units)[: rng.integers(0, slots + 1)])
    before, absent = cache.slot_of[wanted], cache.slot_of[wanted] < 0
    free = np.setdiff1d(np.flatnonzero(cache.unit_of < 0), before)
    taken = free[: rng.integers(0, len(free) + 1)][: slots - len(wanted)]
    scores = cache.eviction_scores().astype(np.float64)
    empty = cache.unit_of < 0
    scores[empty] = np.arange(slots)[empty] - slots
    scores[np.concatenate((before[~absent], taken))] = np.inf
    expected = np.sort(np.argsort(scores, kind="stable")[: np.count_nonzero(absent)])
    gone = cache.unit_of[expected]

    missing, targets = cache.reserve(wanted, taken)
    assert missing.tolist() == wanted[absent].tolist() and targets.tolist() == expected.tolist()
    assert (cache.unit_of[expected] < 0).all() and (cache.slot_of[gone[gone >= 0]] < 0).all()
    assert cache.resident == np.count_nonzero(cache.unit_of >= 0) == np.count_nonzero(cache.slot_of >= 0)


def test_what_cannot_be_is_refused() -> None:
    cache = SlotCache(5, 2)
    put(cache, 1, 2)
    for call in (
        lambda: cache.reserve(ids(0, 3, 4)),
        lambda: cache.reserve(ids(1, 3), taken=ids(1)),
        lambda: cache.reserve(ids(3), taken=ids(2)),
        lambda: cache.reserve(ids(5)),
        lambda: cache.reserve(ids(-1)),
    ):
        with pytest.raises(ValueError, match="expected units 0 to 4"):
            call()
    assert cache.unit_of.tolist() == [1, 2] and cache.slot_of.tolist() == [-1, 0, 1, -1, -1] and cache.resident == 2


def test_what_looks_empty_may_be_taken() -> None:
    cache = SlotCache(9, 4)
    put(cache, 0, 1)
    guessed, taken = cache.reserve(ids(5))
    missing, slots = cache.reserve(ids(0, 6, 7), taken=taken)
    assert missing.tolist() == [6, 7] and not {*taken, *slots, cache.slot_of[0]} ^ {0, 1, 2, 3}
    cache.commit(missing, slots)
    cache.commit(guessed, taken)
    assert cache.resident == 4 and sorted(cache.unit_of) == [0, 5, 6, 7]
