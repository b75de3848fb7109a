"""The trial of whether guesses pay, with a simulated clock."""

from __future__ import annotations

import pytest

from mlx_flash.layers.lookahead_trial import TERM, TURN, TURNS, WARM_UP, LookAheadTrial


def run(trial: LookAheadTrial, clock: list[float], tokens: int, seconds: dict[bool, float]) -> list[bool]:
    """Passes tokens that take so many seconds with and without guesses. Returns whether each token was guessed."""
    modes = []
    for _ in range(tokens):
        trial.token_started()
        modes.append(trial.guessing)
        clock[0] += seconds[trial.guessing]
    return modes


@pytest.mark.parametrize("better", [True, False])
def test_the_quicker_way_is_kept_and_tried_again(better: bool) -> None:
    clock = [0.0]
    trial = LookAheadTrial(lambda: clock[0])
    seconds = {better: 1.0, not better: 1.1}
    length = TURNS * (TURN + 1)
    modes = run(trial, clock, WARM_UP + length, seconds)
    assert modes[:WARM_UP] == [True] * WARM_UP  # a cold cache gives no valid times
    assert modes[WARM_UP:].count(True) == modes[WARM_UP:].count(False) == length // 2
    modes = run(trial, clock, TERM, seconds)
    assert set(modes) == {better}
    # The disk changes, and the next trial notices it.
    modes = run(trial, clock, 2 * length + TERM // 2, {better: 1.1, not better: 1.0})
    assert modes[-1] is not better


def test_a_single_slow_token_decides_nothing() -> None:
    clock = [0.0]
    trial = LookAheadTrial(lambda: clock[0])
    run(trial, clock, WARM_UP + 3, {True: 1.0, False: 1.5})
    clock[0] += 1000.0
    run(trial, clock, TURNS * (TURN + 1), {True: 1.0, False: 1.5})
    assert run(trial, clock, 1, {True: 1.0, False: 1.5}) == [True]


def test_it_may_begin_without_guesses() -> None:
    clock = [0.0]
    modes = run(LookAheadTrial(lambda: clock[0], guessing=False), clock, WARM_UP + 2, {True: 1.0, False: 1.0})
    assert modes == [False] * WARM_UP + [True] * 2
