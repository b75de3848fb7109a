"""The rule that decides between two ways, on scripted times and on simulated noise."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from mlx_flash.flash.paired_turns import LEVEL, LOOKS, OTHER_TOKENS, TURN, UNMEASURED, PairedTurns, chance, verdict

PAIR = 2 * (TURN + UNMEASURED)  # tokens


def run(turns: PairedTurns, seconds: dict[bool, float], tokens: int = 10_000, grow: float = 1.0) -> bool | None:
    """Passes tokens that take so many seconds with and without the candidate, each `grow` times the one before."""
    for token in range(tokens):
        if (won := turns.took("one", seconds[turns.trying] * grow**token)) is not None:
            return won
    return None


@pytest.mark.parametrize(
    ("candidate", "won", "pairs"), [(0.9, True, 6), (0.995, False, 24), (1.0, False, 6), (1.1, False, 4)]
)
def test_a_clear_winner_is_found_soon(candidate: float, won: bool, pairs: int) -> None:
    turns = PairedTurns()
    assert run(turns, {True: candidate, False: 1.0}) is won and len(turns.pairs) == pairs


@pytest.mark.parametrize("grow", [1.01, 0.99])
def test_a_steady_drift_decides_nothing(grow: float) -> None:
    """The drift of a pair is 5 %, and would make one of the two ways win if it always came first."""
    assert run(PairedTurns(), {True: 1.0, False: 1.0}, grow=grow) is False
    assert run(PairedTurns(), {True: 0.9, False: 1.0}, grow=grow) is True


def test_one_slow_token_decides_nothing() -> None:
    turns = PairedTurns()
    assert run(turns, {True: 0.9, False: 1.0}, 2 * PAIR) is None
    turns.took("one", 1000.0)
    assert run(turns, {True: 0.9, False: 1.0}) is True


def test_the_candidate_settles_first() -> None:
    turns = PairedTurns(settle=3)
    seen = []
    for _ in range(3 + PAIR):
        seen.append(turns.trying)
        turns.took("one", 100.0 if len(seen) <= 3 else 1.0)
    half = TURN + UNMEASURED
    assert seen == [True] * 3 + [False] * half + [True] * half and turns.pairs == [0.0]


def test_a_prompt_drops_the_pair_under_way() -> None:
    turns = PairedTurns()
    run(turns, {True: 1.0, False: 1.0}, PAIR - 1)
    before = turns.trying
    turns.interrupted()
    assert (before, turns.trying, turns.pairs) == (True, False, [])
    run(turns, {True: 0.5, False: 1.0}, PAIR)
    assert turns.pairs == [pytest.approx(math.log(0.5))]


def test_only_tokens_of_one_kind_are_compared() -> None:
    turns = PairedTurns()
    for token in range(2 * PAIR):  # passes with drafts, some of which offer fewer
        turns.took("five" if token % 2 else "one", 50.0 if token % 2 else 1.0)
    assert turns.pairs and set(turns.pairs) == {0.0}
    for _ in range(OTHER_TOKENS + PAIR):  # the pair begins again with the kind that goes on
        turns.took("three", 3.0)
    assert set(turns.pairs) == {0.0}


def test_earlier_pairs_count() -> None:
    turns = PairedTurns(pairs=[-0.1] * 5)
    assert run(turns, {True: 0.9, False: 1.0}, PAIR) is True


@pytest.mark.parametrize("pairs", [[-3, -1, 2], [1, 1, -1, -1], [-5, -4, -3, -2, -1], [0, -2, 2, -1], [0, 0]])
def test_the_test_is_exact(pairs: list[float]) -> None:
    """Against all sign patterns in turn."""
    sizes = sorted(abs(pair) for pair in pairs if pair)
    ranks = {size: sizes.index(size) + (sizes.count(size) + 1) / 2 for size in sizes}
    observed = sum(ranks[pair] for pair in pairs if pair > 0)
    patterns = list(itertools.product((0, 1), repeat=len(sizes)))
    as_low = [p for p in patterns if sum(ranks[s] * on for s, on in zip(sizes, p, strict=True)) <= observed]
    assert chance(pairs) == pytest.approx(len(as_low) / len(patterns))


def test_noise_rarely_wins_and_a_gain_mostly_does() -> None:
    """With a noise of 10 % in each pair: 1 in 30 of equally fast ways, nearly all that are 10 % faster."""

    def wins(gain: float) -> float:
        random.seed(1)
        count = 0
        for _ in range(300):
            pairs: list[float] = []
            while (won := verdict(pairs)) is None:
                pairs.append(random.gauss(math.log(1 - gain), 0.1))
            count += won
        return count / 300

    assert wins(0.0) < 2 * LEVEL + 0.02
    assert wins(-0.03) < 0.01
    assert wins(0.1) > 0.95
    assert verdict([-0.1] * LOOKS[-1]) is True


def test_more_pairs_than_ever_asked_for_end() -> None:
    assert verdict([-0.1] * (LOOKS[-1] + 1)) is False
