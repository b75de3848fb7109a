"""The memory plan: sizes in users' notation, and sums that hold."""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flash import errors
from mlx_flash.errors import BudgetError, UsageError
from mlx_flash.flash.files import NeuronLayout
from mlx_flash.flash.stats import Counters
from mlx_flash.loading.options import LoadOptions
from mlx_flash.loading.plan import (
    ENDLESS,
    FREE_SHARE,
    MIN_SLOTS,
    RUN_TO_RUN_BYTES,
    Demand,
    Plan,
    UnitCounts,
    blocks_needed,
    distribute_slots,
    make_plan,
    parse_memory,
    plan_for_budget,
)

MB = 10**6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6GB", 6 * 10**9),
        ("6GiB", 6 * 2**30),
        ("500MB", 500 * MB),
        ("500mib", 500 * 2**20),
        (" 1.5 gb ", 15 * 10**8),
        ("2g", 2 * 10**9),
        ("64k", 64_000),
        ("0.000000001GB", 1),
        ("1.1GB", 1_100_000_000),
        ("9007199254740993KB", 9007199254740993000),
        (123456, 123456),
        (0, 0),
    ],
)
def test_sizes(text: str | int, expected: int) -> None:
    assert parse_memory(text) == expected


@pytest.mark.parametrize(
    "text", ["6", "6000000000", "", "GB", "-6GB", "6 G B", "6TBB", "1e9GB", "six", "0x6GB", "6,5GB"]
)
def test_other_texts_are_refused_with_the_form(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(repr(text)) + ".*such as 6GB, 500MB or 6GiB"):
        parse_memory(text)


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(UsageError, match="memory is -1 bytes"):
        parse_memory(-1)


@given(st.integers(0, 10**500), st.sampled_from(["GB", "MiB"]))
def test_any_number_of_digits(number: int, unit: str) -> None:
    assert parse_memory(f"{number}{unit}") > 0 or number == 0


DEMANDS = st.builds(Demand, *[st.integers(0, 10**10)] * 5)
LAYOUTS = st.builds(
    NeuronLayout.plan,
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.integers(1, 40),
    st.integers(1, 60_000),
    st.integers(1, 9000),
    st.just(("up", "down")),
)


def plan(
    demand: Demand,
    layout: NeuronLayout,
    budget: int | None,
    free: int = 10**12,
    selects: bool = True,
    need: list[float] | None = None,
) -> Plan:
    return make_plan(demand, layout, layout.block_bytes, budget, free, context=2048, selects=selects, need=need)


def check_shares(demand: Demand, layout: NeuronLayout, selects: bool) -> None:
    """Checks that a budget gives its share of slots, or those of the smallest budget. Integers avoid rounding."""
    ample = plan(demand, layout, ENDLESS, 0, selects)
    for share in (0.25, 0.5, 1.0):
        made = plan(demand, layout, ample.bytes_for(share), 0, selects)
        wanted = int(share * layout.layers * layout.blocks)
        assert sum(made.slots) >= wanted
        more_bytes = (sum(made.slots) - wanted) * layout.block_bytes
        # The budget adds room for differences between runs, and completes the block at the end of the share. It counts
        # the prompt caches as if all units were resident.
        spare = (
            RUN_TO_RUN_BYTES
            + layout.block_bytes
            + plan(demand, layout, ample.everything, 0, selects).demand.prompt_caches
        )
        assert made.budget == ample.smallest or more_bytes <= spare


def test_the_room_between_runs_may_be_whole_slots() -> None:
    layout = NeuronLayout.plan("float32", 8, 809, 233, ("up", "down"))
    demand = Demand(0, 0, 0, 0, 1)
    assert RUN_TO_RUN_BYTES % layout.block_bytes == 0
    with pytest.raises(BudgetError):
        plan(demand, layout, None, 0)
    check_shares(demand, layout, selects=True)


@settings(max_examples=300, deadline=None)
@given(DEMANDS, LAYOUTS, st.none() | st.integers(0, 10**11), st.integers(0, 10**11), st.booleans(), st.data())
def test_the_total_keeps_to_the_budget(
    demand: Demand, layout: NeuronLayout, budget: int | None, free: int, selects: bool, data: st.DataObject
) -> None:
    few = data.draw(st.lists(st.floats(), min_size=1, max_size=min(4, layout.layers)))
    shares = [few[layer % len(few)] for layer in range(layout.layers)]
    need = blocks_needed(shares, layout)
    minimum = min(MIN_SLOTS, layout.blocks) if selects else 0
    try:
        made = plan(demand, layout, budget, free, selects, need)
    except BudgetError as error:
        smallest = error.smallest_bytes
        assert smallest % MB == 0 and f"this model needs at least {smallest // MB}MB" in str(error)
        assert smallest > (demand.process + free if budget is None else budget)
        # The printed budget works again, even if the process has grown a little.
        for process in (demand.process, demand.process + RUN_TO_RUN_BYTES):
            made = plan(replace(demand, process=process), layout, parse_memory(f"{smallest // MB}MB"), 0, selects)
            assert min(made.slots) >= minimum and made.total <= made.budget == smallest
        check_shares(demand, layout, selects)
        lower = smallest - RUN_TO_RUN_BYTES - 2 * MB
        with pytest.raises(BudgetError):
            plan(demand, layout, max(0, lower), free, selects)
    else:
        assert made.total == sum(value for key, value in made.as_dict().items() if key not in ("budget", "total"))
        assert made.total <= made.budget
        assert all(minimum <= slots <= layout.blocks for slots in made.slots)
        if min(made.slots) < layout.blocks:  # no memory is left over
            assert made.total + layout.block_bytes > made.budget
        if budget is not None:
            assert made.budget == budget
        else:
            assert made.budget <= demand.process + free


LAYOUT = NeuronLayout.plan("float16", 32, 16384, 4096, ("up", "down"))  # opt-6.7b: 8.6 GB of neurons
DEMAND = Demand(process=400 * MB, resident=2000 * MB, predictors=500 * MB, kv_cache=1000 * MB, workspace=300 * MB)


def test_without_a_budget_a_share_of_what_is_free() -> None:
    assert plan(DEMAND, LAYOUT, None, free=10**10).budget == 400 * MB + FREE_SHARE * 10**10
    roomy = plan(DEMAND, LAYOUT, None, free=10**12)
    assert set(roomy.slots) == {roomy.units.per_layer} and roomy.budget == roomy.total  # all it can use
    # A share that is too small is exceeded if memory is free.
    tight = plan(DEMAND, LAYOUT, None, free=4000 * MB)
    assert set(tight.slots) == {MIN_SLOTS} and 400 * MB + FREE_SHARE * 4000 * MB < tight.budget <= 4400 * MB
    with pytest.raises(BudgetError, match=r"needs at least \d+MB .*; 3\.00 GB are free\. Close other programs"):
        plan(DEMAND, LAYOUT, None, free=3000 * MB)


def test_a_refusal_says_what_needs_how_much() -> None:
    with pytest.raises(BudgetError) as caught:
        plan(DEMAND, LAYOUT, 35 * 10**8)
    for part in (
        "the memory budget is 3500 MB",
        "400 MB process",
        "2000 MB resident",
        "500 MB predictors",
        "--context",
    ):
        assert part in str(caught.value)
    assert caught.value.exit_code == 2
    needed, parts = re.search(r"at least (\d+)MB \((.*)\);", str(caught.value)).groups()  # type: ignore[union-attr]
    assert abs(sum(map(int, re.findall(r"(\d+) MB", parts))) - int(needed)) <= 5  # each is rounded


@pytest.mark.parametrize(
    ("budget", "free", "helps"), [(3500, 0, True), (3000, 0, False), (None, 3000, True), (None, 2000, False)]
)
def test_a_shorter_context_is_named_where_it_would_do(budget: int | None, free: int, helps: bool) -> None:
    """Without its KV cache of 1,000 MB this model needs 3,200 MB, plus some for slots."""
    with pytest.raises(BudgetError) as caught:
        plan(DEMAND, LAYOUT, None if budget is None else budget * MB, free=free * MB)
    assert ("lower --context" in str(caught.value)) is helps


@settings(deadline=None)
@given(
    st.lists(st.floats(1e-3, 1), min_size=1, max_size=12),
    st.integers(0, 20),
    st.integers(1, 10**4),
    st.integers(0, 10**5),
)
def test_slots_go_where_the_need_is(need: list[float], least: int, most: int, total: int) -> None:
    least = min(least, most)
    total = max(total, least * len(need))
    slots = distribute_slots(total, need, least, most)
    assert sum(slots) == min(total, most * len(need)) and all(least <= count <= most for count in slots)
    ordered = [count for _, count in sorted(zip(need, slots, strict=True))]
    assert all(a <= b + 1 for a, b in pairwise(ordered))  # 1 is the remainder of rounding


def test_a_layer_of_twice_the_need_gets_twice_the_slots() -> None:
    assert distribute_slots(700, [0.1, 0.2, 0.4], 16, 1000) == (100, 200, 400)
    assert distribute_slots(700, [0.1, 0.2, 0.4], 16, 250) == (200, 250, 250)
    assert distribute_slots(100, [0.01, 0.2, 0.4], 16, 250) == (16, 28, 56)
    made = plan(DEMAND, LAYOUT, 6 * 10**9, need=[0.01] * 16 + [0.03] * 16)
    assert made.slots[31] // made.slots[0] in (2, 3) and "by need" in made.describe()


def test_a_block_is_needed_for_any_of_its_neurons() -> None:
    assert blocks_needed([0.25, 1.0], LAYOUT) == [0.25, 1.0]
    assert blocks_needed([0.5, 1.0], replace(LAYOUT, neurons_per_block=3)) == [0.875, 1.0]
    assert all(0 < share <= 1 for share in blocks_needed([float("nan"), -1.0, 2.0, 1e308, 0.0], LAYOUT))


def test_naive_loading_needs_no_slots() -> None:
    budget = DEMAND.total + 1
    assert plan(DEMAND, LAYOUT, budget, selects=False).slots == (0,) * LAYOUT.layers
    with pytest.raises(BudgetError):
        plan(DEMAND, LAYOUT, budget)


def test_the_description_has_every_part() -> None:
    lines = plan(DEMAND, LAYOUT, 6 * 10**9).describe().splitlines()
    assert lines[0] == "memory plan"
    figures = [float(line[18:27]) for line in lines[1:]]
    assert len(figures) == 8 and abs(sum(figures[:-1]) - figures[-1]) < 0.005 and figures[-1] <= 6
    assert lines[-1].endswith("of 6.000 GB") and "of 16384 blocks" in lines[4] and "2048 tokens" in lines[5]
    assert lines[6].startswith("  prompt caches") and re.search(r"about \d+ tokens of earlier conversations", lines[6])


@pytest.mark.parametrize(
    ("given", "expected"), [("auto", None), ("0", 0), (0, 0), ("2GB", 2 * 10**9), ("1.5 MiB", 3 << 19), (5, 5)]
)
def test_sizes_of_prompt_caches(given: str | int, expected: int | None) -> None:
    options = LoadOptions(prompt_cache=given)
    options.check()
    assert options.prompt_cache_bytes == expected


@pytest.mark.parametrize("given", ["2", "", "Auto", "-1GB", -1, 2.0, None, True])
def test_other_sizes_of_prompt_caches_are_refused(given: Any) -> None:
    with pytest.raises(UsageError, match="prompt_cache is "):
        LoadOptions(prompt_cache=given).check()


def test_prompt_caches_get_a_tenth_of_what_is_beyond_the_smallest_budget() -> None:
    smallest = plan(DEMAND, LAYOUT, ENDLESS).smallest
    assert plan(DEMAND, LAYOUT, smallest).demand.prompt_caches == 0
    assert plan(DEMAND, LAYOUT, smallest + 1000 * MB).demand.prompt_caches == 100 * MB
    all_units = DEMAND.total + LAYOUT.file_bytes
    for budget, most in ((all_units, 3000 * MB), (all_units + 2000 * MB, 2000 * MB), (ENDLESS, 3000 * MB)):
        made = plan(DEMAND, LAYOUT, budget)
        assert made.demand.prompt_caches == min(most, max((budget - smallest) // 10, budget - all_units))
        assert made.everything == plan(DEMAND, LAYOUT, smallest).everything
    assert "none: only the last conversation" in plan(DEMAND, LAYOUT, smallest).describe()
    assert "100 tokens" in replace(made, demand=replace(DEMAND, prompt_caches=49 * MB)).describe()


@settings(deadline=None)
@given(DEMANDS, LAYOUTS, st.integers(0, 10**10))
def test_prompt_caches_of_a_given_size_are_part_of_the_plan(demand: Demand, layout: NeuronLayout, size: int) -> None:
    def made(budget: int, caches: int | None) -> Plan:
        return make_plan(
            demand, layout, layout.block_bytes, budget, 0, context=2048, selects=True, prompt_caches=caches
        )

    without, given_size = made(ENDLESS, 0), made(ENDLESS, size)
    assert given_size.demand.prompt_caches == size and given_size.everything - without.everything in range(
        size - MB, size + MB + 1
    )
    assert made(ENDLESS, None).smallest == without.smallest
    same = made(given_size.smallest, size)
    assert same.demand.prompt_caches == size and same.total <= same.budget
    if size > 3 * MB:
        with pytest.raises(BudgetError, match=r"MB prompt caches.*lower --prompt-cache"):
            made(without.smallest, size)


def test_a_plan_that_is_larger_than_what_is_free_says_so() -> None:
    """The plan follows the request, because memory that other programs could free is unknown here."""
    wanted = plan(DEMAND, LAYOUT, 6 * 10**9).total - DEMAND.process
    assert "note" not in plan(DEMAND, LAYOUT, 6 * 10**9, free=wanted).describe()
    note = plan(DEMAND, LAYOUT, 6 * 10**9, free=wanted - 10**7).describe().splitlines()[-1]
    assert f"note: {wanted / 1e9:.2f} GB" in note and f"{(wanted - 10**7) / 1e9:.2f} GB are free" in note


def test_deprecated_names_work_for_a_version() -> None:
    counters = Counters(prefetched_used=3, prefetched_unused=4)
    assert (counters.early, counters.vain) == (3, 4)
    with pytest.raises(BudgetError) as caught:
        plan_for_budget(Demand(1, 2, 3, 4, 5), UnitCounts(2, 10, 1, "units"), 1000, 1, 10**9, 8)
    whole = plan_for_budget(Demand(1, 2, 3, 4, 5), UnitCounts(2, 10, 1, "units"), 1000, ENDLESS, 10**9, 8)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.full_bytes == whole.everything and again.units_bytes == 20_000
    assert again.bytes_for(0.5) == whole.bytes_for(0.5)


def test_the_tree_of_errors_is_drawn() -> None:
    drawn = re.findall(r"^    ([ │├└─]*)(\w+)$", errors.__doc__ or "", re.M)
    assert [name for _, name in drawn] == [name for name, kind in vars(errors).items() if isinstance(kind, type)]
    above: list[str] = []
    for indent, name in drawn:
        above[len(indent) // 4 :] = [name]
        assert getattr(errors, name).__bases__[0].__name__ == (above[-2] if len(above) > 1 else "Exception")
