"""Trying out whether guesses pay, with a clock of our own."""

from __future__ import annotations

import pytest

from mlx_flash.layers.lookahead_trial import TERM, TURN, TURNS, WARM_UP, Pace


def run(pace: Pace, clock: list[float], tokens: int, seconds: dict[bool, float]) -> list[bool]:
    """Lets tokens pass that take so long with and without guesses; whether each was guessed at."""
    modes = []
    for _ in range(tokens):
        pace.token()
        modes.append(pace.guessing)
        clock[0] += seconds[pace.guessing]
    return modes


@pytest.mark.parametrize("better", [True, False])
def test_the_quicker_way_is_kept_and_tried_again(better: bool) -> None:
    clock = [0.0]
    pace = Pace(lambda: clock[0])
    seconds = {better: 1.0, not better: 1.1}
    trial = TURNS * (TURN + 1)
    modes = run(pace, clock, WARM_UP + trial, seconds)
    assert modes[:WARM_UP] == [True] * WARM_UP  # a cold cache is no measure
    assert modes[WARM_UP:].count(True) == modes[WARM_UP:].count(False) == trial // 2
    modes = run(pace, clock, TERM, seconds)
    assert set(modes) == {better}
    # The disk changes: the next trial finds out.
    modes = run(pace, clock, 2 * trial + TERM // 2, {better: 1.1, not better: 1.0})
    assert modes[-1] is not better


def test_a_single_slow_token_decides_nothing() -> None:
    clock = [0.0]
    pace = Pace(lambda: clock[0])
    run(pace, clock, WARM_UP + 3, {True: 1.0, False: 1.5})
    clock[0] += 1000.0
    run(pace, clock, TURNS * (TURN + 1), {True: 1.0, False: 1.5})
    assert run(pace, clock, 1, {True: 1.0, False: 1.5}) == [True]


def test_it_may_begin_without_guesses() -> None:
    clock = [0.0]
    modes = run(Pace(lambda: clock[0], guessing=False), clock, WARM_UP + 2, {True: 1.0, False: 1.0})
    assert modes == [False] * WARM_UP + [True] * 2
