"""The number of drafts per pass, chosen from measurements."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.text.draft_depth import FIRST_DEPTH, LEAST_PASSES, REMEMBERED_PASSES, TRY_AGAIN, DraftDepth, Pass

WARM = Pass(0, 0, 9.0, 0.0)  # a request's first pass, which does not count


def passes(depth: int, accepted: list[int], seconds: float, without: int = 0, draft_seconds: float = 0.0) -> list[Pass]:
    """Passes of a request: those with `depth` drafts, and then some without, which take a second each."""
    drafted = [Pass(depth, count, seconds, draft_seconds) for count in accepted]
    return [WARM, *drafted, *[Pass(0, 0, 1.0, 0.0)] * without]


def measured(most: int = 15, *requests: tuple[int, list[Pass]]) -> DraftDepth:
    made = DraftDepth(most)
    for depth, of in requests:
        made.record(depth, of)
    return made


def test_the_first_requests_are_modest() -> None:
    depth = DraftDepth()
    assert [depth.choose() for _ in range(3)] == [FIRST_DEPTH] * 3
    assert DraftDepth(1).choose() == 1 and DraftDepth(0).choose() == 0
    depth.record(3, passes(3, [3] * (LEAST_PASSES - 1), 1.0))
    assert depth.choose() == FIRST_DEPTH


def test_then_one_without_drafts_if_no_pass_was() -> None:
    depth = measured(15, (3, passes(3, [3] * LEAST_PASSES, 1.0)))
    assert depth.choose() == 0
    depth.record(0, passes(0, [], 0.0, LEAST_PASSES))
    assert depth.choose() > 3


@pytest.mark.parametrize(
    ("accepted", "seconds", "expected"),
    [
        ([3] * 10, 1.0, 7),  # all are right and cost nothing: as many as may be concluded from three
        ([0] * 10, 1.05, 0),
        ([0] * 10, 1.0, 0),
        ([3] * 10, 4.2, 0),  # all are right, but a pass takes longer than the tokens alone
        ([3, 2, 0, 1, 3, 0, 1, 3, 2, 1], 1.1, 6),
        ([1, 0, 1, 1, 1, 0, 1, 1, 0, 1], 1.6, 1),  # the second one is never right
    ],
)
def test_the_depth_follows_from_the_measurements(accepted: list[int], seconds: float, expected: int) -> None:
    depth = measured(15, (3, passes(3, accepted, seconds, without=10)))
    assert depth.choose() == expected
    rates = [depth.rate(count) for count in range(8)]
    assert rates[expected] >= max(rates) or max(rates) < 1.03 * rates[0]
    again = measured(15, (3, passes(3, accepted, seconds, without=10)))
    assert again.choose() == expected  # The measurements alone decide.


def test_the_rate_is_tokens_by_seconds() -> None:
    of = [WARM, *[Pass(2, 2, 2.0, 0.2)] * 4, *[Pass(2, 1, 2.0, 0.2)] * 4, *[Pass(0, 0, 1.0, 0.0)] * 8]
    depth = measured(15, (2, of))
    assert depth.rate(0) == pytest.approx(1.0)
    # Half of the passes have drafts, of which the first is always right and the second every other time.
    assert depth.rate(2) == pytest.approx((1 + 0.5 * 1 + 0.5 * 0.5) / (0.5 * 1.0 + 0.5 * 2.0 + 2 * 0.1))
    # A pass with one draft lies between one with none and one with two.
    assert depth.rate(1) == pytest.approx((1 + 0.5) / (0.5 * 1.0 + 0.5 * 1.5 + 0.1))


def test_slow_drafts_lose() -> None:
    fast, slow = (measured(15, (3, passes(3, [3] * 10, 1.2, without=10, draft_seconds=each))) for each in (0.1, 3.6))
    assert fast.choose() > 0 and slow.choose() == 0


def test_the_model_limits_the_depth() -> None:
    assert measured(4, (3, passes(3, [3] * 10, 1.0, without=10))).choose() == 4


def test_drafts_that_lost_are_tried_again() -> None:
    depth = measured(15, (3, passes(3, [0] * 10, 2.0, without=10)))
    assert [depth.choose() for _ in range(TRY_AGAIN + 2)] == [0] * TRY_AGAIN + [FIRST_DEPTH, 0]


def test_new_measurements_outweigh_old_ones() -> None:
    depth = measured(15, (3, passes(3, [0] * REMEMBERED_PASSES, 2.0, without=10)))
    assert depth.choose() == 0
    for _ in range(4):
        depth.record(3, passes(3, [3] * REMEMBERED_PASSES, 1.0, without=10))
    assert depth.choose() >= 3


def test_a_draft_that_is_never_offered_costs_nothing() -> None:
    """N-grams that seldom match lose nothing, and may gain."""
    depth = measured(15, (3, [WARM, *[Pass(3, 3, 1.5, 0.0)] * 10, *[Pass(0, 0, 1.0, 0.0)] * 300]))
    assert depth.choose() >= 3


@st.composite
def requests(draw: st.DrawFn, most: int) -> list[tuple[int, list[Pass]]]:
    found = []
    for depth in draw(st.lists(st.integers(0, most), max_size=6)):
        counts = draw(st.lists(st.tuples(st.integers(0, depth), st.integers(0, depth)), max_size=30))
        seconds = st.floats(0, 10)
        found.append((depth, [Pass(max(pair), min(pair), draw(seconds), draw(seconds)) for pair in counts]))
    return found


@given(st.data(), st.integers(0, 15))
def test_any_measurements_give_a_depth(data: st.DataObject, most: int) -> None:
    depth, same = DraftDepth(most), DraftDepth(most)
    for request in data.draw(requests(most)):
        for each in (depth, same):
            each.record(*request)
        assert 0 <= depth.choose() <= most
        same.choose()
    assert depth.choose() == same.choose()
