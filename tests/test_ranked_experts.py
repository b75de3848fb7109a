"""Experts over several ranks: the bits of one rank, whoever holds which expert in how many slots.

That every type of mixture has them is tested in test_mixture_types.py, beside the same on one rank.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mixtures import make_mixture  # type: ignore[import-not-found]
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from ranked_mixture import ranked  # type: ignore[import-not-found]
from ranks_double import ThreadRank, failing_wait, without_last_row  # type: ignore[import-not-found]
from test_mixture import PROMPT, assert_same, everything  # type: ignore[import-not-found]
from test_mixture_types import prompt_and_tokens  # type: ignore[import-not-found]

from mlx_flash.errors import FlashError, ReadError, UnsupportedModelError
from mlx_flash.layers import expert_products, experts
from mlx_flash.layers.expert_shares import ExpertShares, dealt
from mlx_flash.ranks.later_interrupts import interrupts_later

pytestmark = pytest.mark.usefixtures("one_processor")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture(tmp_path_factory.mktemp("ranked"), "qwen3_moe")


@pytest.fixture(scope="module")
def expected(qwen: Path) -> list[np.ndarray]:
    return everything(load_model(qwen)[0])


def test_all_forms_of_calls(qwen: Path, expected: list[np.ndarray]) -> None:
    """Prompts, tokens, drafts and batches, with shares that are even, lopsided, in slots or read."""
    for weights, slots in (([1, 1], 3), ([1, 10], 8), ([10, 1], 2), ([1, 1, 1, 1], 3)):
        with ranked(qwen, weights, slots) as found:
            assert_same(everything(found.model), expected, (weights, slots))
            assert_same(everything(found.model), expected, (weights, slots, "again"))


def test_a_prompt_goes_expert_by_expert_where_kernels_vary(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "kernels_vary", lambda: True)
    made: list[tuple[int, ...]] = []
    product = expert_products._product

    def noting(linear: Any, x: mx.array, slot: int) -> mx.array:
        made.append(x.shape)
        return product(linear, x, slot)

    monkeypatch.setattr(expert_products, "_product", noting)
    with ranked(qwen, [1], 12) as found:
        alone = prompt_and_tokens(found.model)
        shapes = sorted(made)
    made.clear()
    with ranked(qwen, [1, 2], 3) as found:
        assert_same(prompt_and_tokens(found.model), alone, "two ranks")
    assert sorted(made) == shapes and shapes


def test_a_failed_read_of_rank_0_leaves_the_ranks_in_step(qwen: Path, expected: list[np.ndarray]) -> None:
    with ranked(qwen, [1, 1], 2) as found:
        reader = found.files[0].reader
        for number in (0, 1, 7):
            with failing_wait(reader, number), pytest.raises(ReadError, match="injected"):
                everything(found.model)
            assert_same(everything(found.model), expected, number)


def test_a_failed_read_of_another_rank_leaves_the_ranks_in_step(qwen: Path, expected: list[np.ndarray]) -> None:
    with ranked(qwen, [1, 1], 2) as found:
        reader = found.files[1].reader
        for number in (0, 1, 7):
            with failing_wait(reader, number), pytest.raises(FlashError, match="rank 1: injected"):
                everything(found.model)
            assert_same(everything(found.model), expected, number)


def test_a_file_that_changes_under_another_rank_ends_the_call(qwen: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(qwen, folder)
    with ranked(folder, [1, 1], 12) as found:
        prompt_and_tokens(found.model)
        os.utime(folder / "model.safetensors", (1, 1))
        with pytest.raises(FlashError, match=r"rank 1: .*changed"):
            prompt_and_tokens(found.model)


def test_results_of_another_shape_are_refused(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ThreadRank, "altered", without_last_row)
    with ranked(qwen, [1, 1], 2) as found, pytest.raises(FlashError, match=r"it returns \[\d+, 64\] .* is expected"):
        mx.eval(found.model(mx.array([PROMPT]), cache=make_prompt_cache(found.model)))


def test_ctrl_c_in_a_call_leaves_the_ranks_in_step(
    qwen: Path, expected: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: ThreadRank, *__: object) -> list[mx.array]:
        raise KeyboardInterrupt

    with ranked(qwen, [1, 1], 2) as found:
        with monkeypatch.context() as patched:
            patched.setattr(ThreadRank, "results", interrupted)
            with pytest.raises(KeyboardInterrupt):
                mx.eval(found.model(mx.array([PROMPT]), cache=make_prompt_cache(found.model)))
        assert len(found.group.calls_made) == 1
        assert_same(everything(found.model), expected, "after the interrupt")


def test_only_the_main_thread_keeps_interrupts_back() -> None:
    def elsewhere() -> None:
        with interrupts_later():
            done.append(True)

    done: list[bool] = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert done
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_later():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_router_that_skips_experts_is_refused(qwen: Path) -> None:
    with ranked(qwen, [1, 1], 2) as found:
        layer = found.model.layers[0].mlp.switch_mlp
        with pytest.raises(UnsupportedModelError, match="chose expert 12"):
            layer(mx.zeros((1, 1, 64)), mx.array([[[3, 12]]]))
        with pytest.raises(UnsupportedModelError, match="not sent to other ranks"):
            layer(mx.zeros((1, 1, 64), mx.int32), mx.array([[[0, 1]]]))
        assert not found.group.calls_made


def test_a_call_of_rank_0s_own_experts_is_not_sent(qwen: Path) -> None:
    with ranked(qwen, [1, 1], 6) as found:
        layer = found.model.layers[0].mlp.switch_mlp
        own = mx.array(layer._shares.of(0)[:2])[None, None]
        assert layer(mx.ones((1, 1, 64)), own).shape == (1, 1, 2, 64)
        assert not found.group.calls_made


# -- shares ----------------------------------------------------------------------------------------------------------


def test_experts_are_dealt_out_in_turns() -> None:
    assert dealt([3, 3]).tolist() == [0, 1, 0, 1, 0, 1]
    assert dealt([1, 3]).tolist() == [1, 0, 1, 1]
    for counts in ([5, 3, 8], [1, 63], [16, 16, 16, 16], [7, 0, 2]):
        holder = dealt(counts)
        assert np.bincount(holder, minlength=len(counts)).tolist() == counts
        for rank, count in enumerate(counts):
            seen = np.cumsum(holder == rank) - np.arange(1, len(holder) + 1) * count / len(holder)
            assert np.abs(seen).max() <= 1


def test_pairs_are_divided_and_taken_back() -> None:
    rng = np.random.default_rng(3)
    for counts in ([6, 6], [1, 11], [4, 4, 4], [1, 2, 3, 6]):
        shares = ExpertShares(counts)
        for size in (1, 4, 100):
            pairs = rng.integers(0, 12, size)
            divided = shares.divide(pairs)
            for rank, members in enumerate(divided.members):
                assert (shares.holder[pairs[members]] == rank).all() and (np.diff(members) > 0).all()
                assert (shares.of(rank)[shares.place[pairs[members]]] == pairs[members]).all()
            assert np.concatenate(divided.members)[divided.back].tolist() == list(range(size))
