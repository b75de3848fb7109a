"""The hidden states that a draft head draws on: which are kept, and for which prompt cache."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from mlx_flash.text.draft_head import HiddenStates


def rows(begin: int, end: int) -> list[mx.array]:
    """States that are their places."""
    return [mx.zeros((1, end - begin, 3)), mx.broadcast_to(mx.arange(begin, end)[None, :, None], (1, end - begin, 3))]


def kept(states: HiddenStates, cache: list[KVCache], end: int) -> list[int]:
    begin = states.place_for(cache, end)
    found: list[int] = np.array(states.between(begin, end))[0, :, 0].tolist() if begin < end else []
    assert found == list(range(begin, end))
    return found


def test_the_newest_states_of_one_cache_are_kept() -> None:
    states, one, other = HiddenStates(6), [KVCache()], [KVCache()]
    assert kept(states, one, 4) == []
    states.note(one, 0, rows(0, 4))
    assert kept(states, one, 4) == [0, 1, 2, 3] and kept(states, one, 2) == [0, 1] and kept(states, one, 5) == []
    assert kept(states, other, 4) == []
    states.note(one, 4, rows(4, 9))
    assert kept(states, one, 9) == [3, 4, 5, 6, 7, 8]
    states.note(one, 5, rows(5, 7))  # four tokens were taken back
    assert kept(states, one, 7) == [3, 4, 5, 6] and kept(states, one, 8) == []
    states.note(one, 7, rows(7, 20))
    assert kept(states, one, 20) == [14, 15, 16, 17, 18, 19]


def test_states_are_forgotten() -> None:
    states, one, other = HiddenStates(6), [KVCache()], [KVCache()]
    states.note(one, 0, rows(0, 4))
    states.note(one, 6, rows(6, 8))  # after a gap
    assert kept(states, one, 8) == [6, 7]
    states.note(one, 2, rows(2, 4))  # before all of them
    assert kept(states, one, 4) == [2, 3]
    states.note(one, 4, None)  # the model returned none
    assert kept(states, one, 5) == kept(states, one, 4) == []
    states.note(one, 5, rows(5, 6))
    states.note(other, 6, rows(6, 7))
    assert kept(states, one, 6) == [] and kept(states, other, 7) == [6]
    other.clear()  # An array of another cache may get its address.
    assert kept(states, one, 7) == []
