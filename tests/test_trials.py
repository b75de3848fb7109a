"""The trials of several options, with scripted times."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlx_flash.flash.trials import LIFE_S, TERM, WARM_UP, Choice, Trial, Trials

DAY = 24 * 3600.0


class Machine:
    """A machine on which the time of a token is a product of what each option's choice costs."""

    def __init__(self, costs: dict[str, dict[Any, float]], fixed: tuple[str, ...] = ()) -> None:
        """costs: option -> choice -> factor, the default first."""
        self.costs, self.now, self.kept = costs, 1e9, list[dict[str, Any]]()
        self.used: dict[str, Choice] = {name: next(iter(choices)) for name, choices in costs.items()}
        self.history: list[dict[str, Choice]] = []
        self.fixed = fixed
        self.refused: tuple[str, Choice] | None = None
        self.trials = self.start(None)

    def start(self, kept: Any) -> Trials:
        self.used = {name: next(iter(choices)) for name, choices in self.costs.items()}
        trials = [
            Trial(name, list(choices), self._use(name), 2, name in self.fixed) for name, choices in self.costs.items()
        ]
        self.trials = Trials(
            trials, kept, lambda results: self.kept.append(json.loads(json.dumps(results))), lambda: self.now
        )
        return self.trials

    def _use(self, name: str) -> Any:
        def use(choice: Choice) -> bool | None:
            if self.refused == (name, choice):
                return False
            self.used[name] = choice
            return None

        return use

    def run(self, tokens: int, misses: int = 5) -> None:
        for _ in range(tokens):
            seconds = 0.01
            for name, choice in self.used.items():
                seconds *= self.costs[name][choice]
            self.history.append(dict(self.used))
            self.trials.took(1, 1, seconds, misses)

    def present(self) -> dict[str, Choice]:
        return {name: trial.present for name, trial in self.trials.items()}


COSTS: dict[str, dict[Any, float]] = {
    "lookahead": {False: 1.0, True: 0.8},
    "io": {"direct": 1.0, "buffered": 1.3},
    "threads": {16: 1.0, 8: 0.9, 32: 0.7},
}
BEST = {"lookahead": True, "io": "direct", "threads": 32}


def test_the_best_choices_are_found_one_option_at_a_time() -> None:
    machine = Machine(COSTS)
    machine.run(WARM_UP)
    assert machine.history == [{"lookahead": False, "io": "direct", "threads": 16}] * WARM_UP
    machine.run(600)
    assert machine.present() == machine.used == BEST and machine.trials.trying is None
    changes = zip(machine.history, machine.history[1:], strict=False)
    assert all(sum(a[name] != b[name] for name in a) <= 1 for a, b in changes)
    told = machine.trials.choices()
    assert {name: each["by"] for name, each in told.items()} == dict.fromkeys(COSTS, "trial")
    assert machine.trials["io"].ratios == {"buffered": 1.3}
    assert machine.trials["threads"].ratios == {"16": 1.1111, "8": 1.2857}
    assert machine.trials.line() == "Choices: look-ahead on (tried), reads direct (tried), 32 threads (tried)"


def test_nothing_is_tried_where_nothing_is_read() -> None:
    machine = Machine(COSTS)
    machine.run(2 * TERM, misses=0)
    assert machine.history == [machine.history[0]] * (2 * TERM) and not machine.kept
    machine.run(100)
    assert machine.trials.trying is not None


def test_equally_fast_choices_leave_the_default() -> None:
    machine = Machine({"io": {"direct": 1.0, "buffered": 1.0}})
    machine.run(WARM_UP + 200)
    assert machine.present() == {"io": "direct"} and machine.trials["io"].tried_at is not None


def test_a_change_of_the_machine_is_noticed_later() -> None:
    machine = Machine({"io": {"direct": 1.0, "buffered": 1.5}})
    machine.run(WARM_UP + 200)
    machine.costs["io"]["direct"] = 2.0
    machine.run(TERM - 200)
    assert machine.used == {"io": "direct"}
    machine.run(400)
    assert machine.used == {"io": "buffered"}


def test_the_users_choice_is_never_tried() -> None:
    machine = Machine(COSTS, fixed=("lookahead", "io", "threads"))
    machine.run(WARM_UP + 500)
    assert {tuple(each.items()) for each in machine.history} == {tuple(machine.history[0].items())}
    assert machine.trials.choices()["io"] == {"choice": "direct", "by": "you", "trying": False}
    assert machine.trials.line() == "Choices: look-ahead off (yours), reads direct (yours), 16 threads (yours)"


def test_a_choice_may_be_fixed_in_the_middle_of_its_trial() -> None:
    machine = Machine(COSTS)
    machine.run(WARM_UP + 1)
    assert machine.trials.trying == "lookahead"
    machine.trials.fix("lookahead", False)
    machine.trials.fix("unknown", 1)
    machine.run(600)
    assert machine.present() == {**BEST, "lookahead": False}
    assert all(not each["lookahead"] for each in machine.history[WARM_UP + 1 :])


def test_the_next_start_begins_with_what_was_found() -> None:
    machine = Machine(COSTS)
    machine.run(800)
    count = len(machine.kept)
    assert count == len(COSTS), "written once for each option"
    machine.trials.close()
    assert len(machine.kept) == count
    machine.now += 10 * DAY
    machine.start(machine.kept[-1])
    assert machine.present() == machine.used == BEST
    machine.history.clear()
    machine.run(TERM - 1)
    assert machine.history == [BEST] * (TERM - 1)
    machine.now += LIFE_S
    machine.start(machine.kept[-1])
    machine.run(WARM_UP + 10)
    assert machine.trials.trying == "lookahead"


def test_a_comparison_is_continued_by_the_next_start() -> None:
    machine = Machine({"io": {"direct": 1.0, "buffered": 0.8}})
    machine.run(WARM_UP + 35)
    assert machine.present() == {"io": "direct"}
    machine.trials.close()
    pairs = machine.kept[-1]["unfinished"]["io"]["pairs"]
    assert len(pairs) == 3
    machine.start(machine.kept[-1])
    machine.run(WARM_UP + 35)
    assert machine.present() == {"io": "buffered"} and machine.kept[-1]["unfinished"] == {}


def test_a_users_choice_leaves_the_earlier_result() -> None:
    machine = Machine(COSTS)
    machine.run(800)
    kept = machine.kept[-1]
    machine.fixed = ("threads",)
    machine.start(kept)
    assert machine.present()["threads"] == 16
    machine.run(TERM + 800)
    assert machine.kept[-1]["trials"]["threads"] == kept["trials"]["threads"]


def test_a_choice_that_is_fixed_later_leaves_the_earlier_result() -> None:
    machine = Machine(COSTS)
    machine.run(800)
    found = machine.kept[-1]["trials"]["threads"]
    machine.trials.fix("threads", 16)
    assert machine.present()["threads"] == 16 and machine.trials.results()["trials"]["threads"] == found


@pytest.mark.parametrize(
    "kept",
    [
        *([], "x", 3, {"trials": 1, "unfinished": 2}, {"trials": {"io": 5}}, {"trials": {"io": {"choice": "tape"}}}),
        {"trials": {"io": {"choice": "buffered", "choices": ["direct", "buffered"], "tried_at": None}}},
        {"trials": {"io": {"choice": "buffered", "choices": ["buffered", "direct"], "tried_at": 1e9}}},
        {"trials": {"threads": {"choice": True, "choices": [16, 8, 32], "tried_at": 1e9}}},
        {"unfinished": {"lookahead": {"candidate": True, "against": False, "pairs": ["a"]}, "io": None}},
        {"unfinished": {"lookahead": {"pairs": [float("nan")]}}},
        {"trials": {"io": {"choice": "buffered", "choices": ["direct", "buffered"], "tried_at": 10**400}}},
    ],
)
def test_damaged_results_are_ignored(kept: Any) -> None:
    machine = Machine(COSTS)
    machine.start(kept)
    assert machine.present() == {"lookahead": False, "io": "direct", "threads": 16}
    machine.run(800)
    assert machine.present() == BEST


def test_pairs_that_no_machine_measures_end_in_a_result() -> None:
    machine = Machine({"io": {"direct": 1.0, "buffered": 0.5}})
    machine.start({"unfinished": {"io": {"candidate": "buffered", "against": "direct", "pairs": 11 * [-99.0]}}})
    machine.run(100)
    assert machine.kept[-1]["trials"]["io"]["choice"] == "buffered"


def test_a_choice_that_cannot_be_used_is_left_out() -> None:
    machine = Machine(COSTS)
    machine.refused = ("threads", 32)
    machine.run(800)
    assert machine.present() == {**BEST, "threads": 8}


def test_a_prompt_between_tokens_drops_their_pair() -> None:
    machine = Machine({"io": {"direct": 1.0, "buffered": 0.5}})
    for _ in range(100):  # answers of five tokens
        machine.run(5)
        machine.trials.interrupted()
    assert machine.present() == {"io": "direct"} and not machine.kept


def test_slots_that_come_and_go_drop_their_pair() -> None:
    machine = Machine({"io": {"direct": 1.0, "buffered": 0.5}})
    for _ in range(100):
        machine.run(5)
        machine.trials.took(1, 1, 9.0, 5, resized=True)
    assert machine.present() == {"io": "direct"} and not machine.kept


def test_a_choice_that_cannot_be_left_is_the_present_one() -> None:
    trial = Trial("io", ["direct", "buffered"], lambda choice: choice == "buffered")
    assert trial.use("buffered")
    trial.keep("direct")
    assert trial.present == "buffered"


def test_no_trials_cost_nothing() -> None:
    trials = Trials()
    trials.took(1, 1, 1.0, 5)
    trials.interrupted()
    trials.close()
    assert not trials and trials.choices() == {}
