"""The context that a plan makes room for: by default as much as leaves enough units in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]  # found beside this file
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import make_mixture  # type: ignore[import-not-found]

from mlx_flash.defaults import CONTEXT, KV_STEP_TOKENS, MOST_CONTEXT
from mlx_flash.errors import BudgetError, UsageError
from mlx_flash.flash.files import round_up
from mlx_flash.loading import in_place_loading
from mlx_flash.loading.context import MOST_TRIALS, plan_context
from mlx_flash.loading.in_place_plan import InPlacePlan
from mlx_flash.loading.load import load, plan
from mlx_flash.loading.options import LoadOptions
from mlx_flash.loading.plan import ENDLESS, FREE_SHARE, RUN_TO_RUN_BYTES, Demand, Plan, UnitCounts, plan_for_budget

MB = 10**6
SLOT = MB  # bytes
UNITS = UnitCounts(10, 100, 2, "experts of each layer")
PROCESS, RESIDENT = 100 * MB, 200 * MB


class Model:
    """A model of 10 layers of 100 units of a megabyte, whose context takes `per_token` bytes per token."""

    def __init__(self, per_token: int, positions: int | None = 131072, free: int = 0, caches: int | None = 0) -> None:
        """caches: bytes for earlier conversations; None for their share."""
        self.per_token, self.positions, self.free, self.caches = per_token, positions, free, caches
        self.tried: list[int] = []

    def demand(self, context: int) -> Demand:
        self.tried.append(context)
        return Demand(PROCESS, RESIDENT, 0, self.per_token * round_up(context, KV_STEP_TOKENS), 50 * MB)

    def plan(self, budget: int | None, asked: int | str | None = None) -> Plan:
        def divide(demand: Demand, context: int, note: str) -> Plan:
            return plan_for_budget(demand, UNITS, SLOT, budget, self.free, context, prompt_caches=self.caches)

        return plan_context(asked, self.positions, self.demand, divide, budget, self.free)

    def slots(self, budget: int, context: int) -> int:
        return min(1000, (budget - self.demand(context).total) // SLOT)


def test_the_third_at_its_edge() -> None:
    """Each step of 256 tokens takes 10 MB, and the slots may give up 100 of their 300."""
    model = Model(per_token=10 * MB // KV_STEP_TOKENS)
    budget = model.demand(CONTEXT).total + 300 * SLOT
    ten_steps = CONTEXT + 10 * KV_STEP_TOKENS
    assert model.plan(budget).context == ten_steps
    assert sum(model.plan(budget).slots) == 200
    # A megabyte less leaves room for 299 units, of which 99 may be given up.
    assert model.plan(budget - SLOT).context == ten_steps - KV_STEP_TOKENS
    assert len(set(model.tried)) <= 2 + MOST_TRIALS


@settings(deadline=None)
@given(
    st.integers(0, 200_000),
    st.none() | st.integers(1, 200_000),
    st.integers(0, 2000) | st.integers(0, 20_000),
)
def test_the_longest_that_leaves_two_thirds(per_token: int, positions: int | None, more: int) -> None:
    model = Model(per_token, positions)
    least, most = min(CONTEXT, positions or CONTEXT), min(MOST_CONTEXT, positions or MOST_CONTEXT)
    budget = model.demand(least).total + 20 * SLOT + RUN_TO_RUN_BYTES + more * MB
    made = model.plan(budget)
    assert least <= made.context <= most
    assert made.context in (least, most) or made.context % KV_STEP_TOKENS == 0
    base = model.slots(budget, least)
    assert 3 * sum(made.slots) >= 2 * base and made.total <= budget
    if made.context < most:
        longer = min(most, made.context // KV_STEP_TOKENS * KV_STEP_TOKENS + KV_STEP_TOKENS)
        assert 3 * model.slots(budget, longer) < 2 * base or model.slots(budget, longer) < 20
    assert len(set(model.tried)) <= 4 + MOST_TRIALS
    # The budgets that a plan names hold for any later plan.
    smallest = model.plan(made.smallest)
    assert smallest.context >= least and made.smallest == model.plan(made.smallest, least).smallest
    assert model.plan(made.everything).context == most and model.plan(made.everything).slot_share == 1
    for share in (0.25, 0.5):
        assert model.plan(made.bytes_for(share)).slot_share >= share or made.bytes_for(share) == made.smallest


@given(st.integers(0, 200_000), st.integers(0, 20_000))
def test_with_a_share_for_earlier_conversations(per_token: int, more: int) -> None:
    model = Model(per_token, caches=None)
    budget = model.demand(CONTEXT).total + 20 * SLOT + RUN_TO_RUN_BYTES + more * MB
    made, base = model.plan(budget), model.plan(budget, CONTEXT)
    assert 3 * sum(made.slots) >= 2 * sum(base.slots) and made.total <= budget
    full = model.plan(made.everything)
    assert full.context == MOST_CONTEXT and full.slot_share == 1


def test_a_budget_that_worked_before_still_does() -> None:
    model = Model(per_token=100_000)
    with pytest.raises(BudgetError) as refused:
        model.plan(PROCESS)
    with pytest.raises(BudgetError) as before:
        model.plan(PROCESS, CONTEXT)
    assert str(refused.value) == str(before.value)
    assert refused.value.smallest_bytes == before.value.smallest_bytes
    assert model.plan(refused.value.smallest_bytes).context == CONTEXT
    ample = model.plan(ENDLESS)
    assert refused.value.full_bytes == ample.everything and refused.value.bytes_for(0.5) == ample.bytes_for(0.5)


def test_positions_are_the_limit() -> None:
    assert Model(10_000, positions=1000).plan(ENDLESS).context == 1000
    assert Model(10_000, positions=5000).plan(ENDLESS).context == 5000
    assert Model(10_000, positions=None).plan(ENDLESS).context == MOST_CONTEXT
    assert Model(10_000, positions=200_000).plan(ENDLESS).context == MOST_CONTEXT
    assert Model(10_000, positions=1000).plan(ENDLESS, 4096).context == 1000


def test_a_number_and_all_positions() -> None:
    model = Model(10_000)
    assert model.plan(10_000 * MB, 777).context == 777 and model.plan(10_000 * MB, "max").context == 131072
    with pytest.raises(BudgetError):
        model.plan(600 * MB, "max")
    with pytest.raises(UsageError, match="names no positions for a context"):
        Model(10_000, positions=None).plan(ENDLESS, "max")


def test_without_a_budget_a_share_of_the_free_memory_counts() -> None:
    """The rule is that of a budget of so much. The plan takes no more, unless even the shortest context does."""
    for free in (500, 800, 1500, 10**4):
        model = Model(per_token=50_000, free=free * MB)
        memory = int(PROCESS + FREE_SHARE * free * MB)
        with_budget = None
        try:
            with_budget = model.plan(memory)
        except BudgetError:
            assert model.plan(None).context == CONTEXT
        made = model.plan(None)
        if with_budget is not None:
            assert (made.context, made.slots) == (with_budget.context, with_budget.slots) and made.budget <= memory


# -- models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_mixture(tmp_path_factory.mktemp("long") / "m", "qwen3_moe", max_position_embeddings=8192, head_dim=64)
    write_tokenizer(folder)
    return folder


def test_a_mixture_by_its_budget(long_mixture: Path) -> None:
    ample = plan(long_mixture, memory=ENDLESS)
    assert (
        ample.context == 8192 and "8192 tokens, all of the model's positions; 2048 would save 0.0" in ample.describe()
    )
    short = plan(long_mixture, memory=ENDLESS, context=CONTEXT)
    assert ample.smallest == short.smallest and "2048 tokens\n" in short.describe()
    assert ample.demand.kv_cache == 4 * short.demand.kv_cache and ample.demand.workspace > short.demand.workspace
    assert CONTEXT <= plan(long_mixture, memory=ample.smallest).context < 8192
    units = short.units
    least = plan(long_mixture, memory=short.demand.total + units.layers * units.least * short.slot_bytes)
    assert least.context == CONTEXT and "2048 tokens of the model's 8192, the least (--context N)" in least.describe()
    assert plan(long_mixture, memory=ample.everything).context == 8192
    assert plan(long_mixture, memory=ENDLESS, context="max").context == 8192
    assert plan(long_mixture, memory=ENDLESS, context=5000).context == 5000


def test_what_a_longer_context_takes_is_said(long_mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With units of a megabyte, so that the slots are worth giving up."""
    real = in_place_loading.plan_for_budget

    def divide(demand: Demand, units: UnitCounts, _: int, *rest: Any, **more: Any) -> Plan:
        return real(demand, units, MB, *rest, **more)

    monkeypatch.setattr(in_place_loading, "plan_for_budget", divide)
    ample, short = (plan(long_mixture, memory=ENDLESS, context=context) for context in (None, CONTEXT))
    budget = short.demand.total + 21 * MB  # 7 of 21 units may be given up
    made = plan(long_mixture, memory=budget)
    assert CONTEXT < made.context < ample.context and made.context % KV_STEP_TOKENS == 0
    assert sum(made.slots) >= 14 and made.total <= budget
    price = made.demand.total - short.demand.total
    assert price <= 7 * MB
    note = f"{made.context} tokens of the model's 8192; 2048 would save {price / 1e9:.3f} GB (--context N)"
    assert note in made.describe()
    longer = plan(long_mixture, memory=budget, context=made.context + KV_STEP_TOKENS)
    assert longer.demand.total - short.demand.total > 7 * MB


def test_a_longer_context_makes_a_token_read_a_tenth_more_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With layers of 4 MB: every one that a context takes is read for every token."""
    folder = make_mixture(tmp_path / "m", "llama", max_position_embeddings=8192, num_hidden_layers=40)
    write_tokenizer(folder)
    real = in_place_loading.plan_for_budget

    def divide(demand: Demand, units: UnitCounts, _: int, *rest: Any, **more: Any) -> Plan:
        return real(demand, units, 4 * MB, *rest, **more)

    monkeypatch.setattr(in_place_loading, "plan_for_budget", divide)
    short = plan(folder, memory=ENDLESS, context=CONTEXT)
    budget = short.demand.total + 14 * 4 * MB  # 12 layers beside two buffers, so that 28 are read
    made, base = (plan(folder, memory=budget, context=context) for context in (None, CONTEXT))
    assert isinstance(made, InPlacePlan) and isinstance(base, InPlacePlan)
    assert (base.pinned, base.spare_slots) == (12, 2)
    assert made.pinned >= 10 and made.context > CONTEXT
    whole = plan(folder, memory=short.everything)
    assert isinstance(whole, InPlacePlan)
    assert whole.pinned == 40 and whole.spare_slots == 0


def test_a_store_has_all_of_its_positions(store: Path) -> None:
    made = plan(store)
    assert made.context == 64 and "64 tokens, all of the model's positions\n" in made.describe()
    assert LoadOptions().context is None


def test_the_model_keeps_to_the_chosen_context(long_mixture: Path) -> None:
    model, _ = load(long_mixture, memory=plan(long_mixture).everything)
    try:
        assert model.flash.plan.context > CONTEXT and model.flash.positions == 8192
    finally:
        model.flash.close()


def test_the_commands(long_mixture: Path, generate_command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def found(*flags: str) -> int:
        command = [sys.executable, "-c", "from mlx_flash.cli.main import main; main()", "plan", "--json", *flags]
        done = subprocess.run([*command, "--model", str(long_mixture)], capture_output=True, text=True, check=True)
        return int(json.loads(done.stdout)["context"])

    assert found("--context", "max") == 8192 and found("--context", "300") == 300 and found("--memory", "9GB") == 8192
    with pytest.raises(SystemExit):
        generate_command.make_parser().parse_args(["--context", "many"])
    assert "'many' is neither a whole number nor max" in capsys.readouterr().err


@given(st.integers(0, 200_000), st.integers(0, 300), st.integers(0, 20_000))
def test_prompt_caches_have_room_for_structured_answers(per_token: int, grammars: int, more: int) -> None:
    """As long as they leave the slots three quarters of what is beyond the smallest budget."""

    class Structured(Model):
        def demand(self, context: int) -> Demand:
            return replace(super().demand(context), grammars=grammars * MB)

    model = Structured(per_token, caches=None)
    made = model.plan(model.demand(CONTEXT).total + 20 * SLOT + RUN_TO_RUN_BYTES + more * MB, CONTEXT)
    beyond = made.budget - made.smallest
    caches = made.demand.prompt_caches
    assert made.total <= made.budget and (caches >= min(grammars * MB, beyond // 4))
    assert caches <= max(grammars * MB, 3 * made.demand.kv_cache)
    for asked in (CONTEXT, None):
        other = model.plan(made.budget, asked)
        full = model.plan(other.everything, asked)
        assert full.slot_share == 1
        for share in (0.25, 0.5):
            assert (
                model.plan(other.bytes_for(share), asked).slot_share >= share
                or other.bytes_for(share) == other.smallest
            )
