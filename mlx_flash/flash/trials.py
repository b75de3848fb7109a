"""Tries options that do not change the text while tokens are generated, and keeps what is faster on this machine.

Which way of reading is fastest depends on the disk, the processor, the budget and the model, so it cannot be decided
here. One option is tried at a time, the others as they are. paired_turns.py has the rule that decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .paired_turns import PairedTurns, gain

WARM_UP = 24  # tokens before the first trial, because a cold cache is not representative
PAUSE = 8  # tokens between two trials
TERM = 4000  # tokens until all options are tried again
LATEST = 1e12  # no result is from later, in seconds since 1970
LEAST_RATIO = 1e-4  # that is told of a choice's time
LIFE_S = 30 * 24 * 3600.0  # results that are older are tried again at once

Choice = bool | int | str


class Trial:
    """One option. name: for programs. choices: those that are tried, the default first. present: the one in use.

    fixed: whether the user made the choice. ratios: for each other choice, its time per token as a share of the time of
    the one that it was last compared with. tried_at: end of the last comparison, in seconds since 1970; None if there
    was none.
    """

    def __init__(
        self,
        name: str,
        choices: Sequence[Choice],
        use: Callable[[Choice], bool | None],
        settle: int = 0,
        fixed: bool = False,
    ) -> None:
        """use: puts a choice into effect between two tokens; returns False if it cannot. settle: see `PairedTurns`.

        The first choice must be in effect.
        """
        self.name, self.choices, self.settle, self.fixed = name, tuple(choices), settle, fixed
        self.present = self.choices[0]
        self.ratios: dict[str, float] = {}
        self.tried_at: float | None = None
        self._use = use
        self._used = self.present

    @property
    def open(self) -> bool:
        """Whether there is something to try."""
        return not self.fixed and len(self.choices) > 1

    def use(self, choice: Choice) -> bool:
        """Puts a choice into effect. False if it cannot be; then it is not tried again."""
        if choice != self._used:
            if self._use(choice) is False:
                self.choices = tuple(each for each in self.choices if each != choice)
                return False
            self._used = choice
        return True

    def keep(self, choice: Choice) -> None:
        """Makes a choice the present one. If it cannot be used, that is the one in effect."""
        self.use(choice)
        self.present = self._used


class Trials(Mapping[str, Trial]):
    """The trials of a loaded model, by name. It is told what every token took, and decides what is tried when.

    trying: name of the option that is being tried; None between trials.
    """

    def __init__(
        self,
        trials: Sequence[Trial] = (),
        kept: dict[str, Any] | None = None,
        keep: Callable[[dict[str, Any]], None] = lambda _: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """kept: what `keep` was given in an earlier process under the same conditions. keep: called with the results
        whenever they have changed. now: seconds since 1970."""
        self._trials = {trial.name: trial for trial in trials}
        self._keep, self._now = keep, now
        self._unfinished: dict[str, Any] = {}
        self._earlier: dict[str, Any] = {}  # results for options that the user has fixed
        self._changed = False
        if isinstance(kept, dict):
            self._remember(kept)
        self._left = WARM_UP
        self._missed = 0
        self._queue = [each for each in self._trials.values() if self._is_due(each)]
        if not self._queue:
            self._left = TERM
        self._now_trying: Trial | None = None
        self._candidates: list[Choice] = []  # of that option, yet to be tried
        self._turns: PairedTurns | None = None
        self._idle = not any(trial.open for trial in trials)

    def __getitem__(self, name: str) -> Trial:
        return self._trials[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._trials)

    def __len__(self) -> int:
        return len(self._trials)

    @property
    def trying(self) -> str | None:
        return None if self._now_trying is None else self._now_trying.name

    def took(self, rows: int, positions: int, seconds: float, misses: int, resized: bool = False) -> None:
        """Counts a pass over the weights that decoded tokens. It may change a choice, so the model must not be running.

        rows: sequences. positions: tokens of each. seconds: of the pass. misses: units that it had to read.
        resized: whether slots were given back or taken again meanwhile.
        """
        if self._idle:
            return
        if resized:
            self.interrupted()
            return
        turns = self._turns
        if turns is None:
            self._missed += misses
            self._left -= 1
            if self._left <= 0:
                self._begin()
            return
        won = turns.took((rows, positions), seconds)
        if won is not None:
            self._end(turns, won)
        else:
            self._follow(turns)

    def interrupted(self) -> None:
        """Must be called when the model computes something else than decoded tokens, such as a prompt."""
        if self._turns is not None:
            self._turns.interrupted()
            self._follow(self._turns)

    def fix(self, name: str, choice: Choice) -> None:
        """Ends the trials of an option: from now on, the choice is this one. Nothing happens without such an option."""
        if (trial := self._trials.get(name)) is None:
            return
        if self._now_trying is trial:
            self._turns, self._now_trying, self._candidates, self._left = None, None, [], PAUSE
        if not trial.fixed and trial.tried_at is not None:
            self._earlier[name] = _result(trial)
        trial.fixed = True
        trial.keep(choice)
        self._idle = not any(each.open for each in self._trials.values())

    def close(self) -> None:
        """Keeps what is known of a comparison under way."""
        if self._now_trying is not None and self._turns is not None and self._turns.pairs:
            self._note_unfinished(self._now_trying, self._turns)
            self._changed = True
        if self._changed:
            self._changed = False
            self._keep(self.results())

    def results(self) -> dict[str, Any]:
        """What `keep` is given: plain JSON. A choice that the user fixed is not a result, and leaves an earlier one."""
        found: dict[str, Any] = {**self._earlier}
        for trial in self._trials.values():
            if trial.tried_at is not None and not trial.fixed:
                found[trial.name] = _result(trial)
        return {"trials": found, "unfinished": self._unfinished}

    def choices(self) -> dict[str, dict[str, Any]]:
        """For people and programs: the choice of every option, and where it comes from.

        "by": "you", "trial", or "default". "trying": whether the option is being tried.
        """
        return {
            trial.name: {
                "choice": trial.present,
                "by": "you" if trial.fixed else "default" if trial.tried_at is None else "trial",
                "trying": trial is self._now_trying,
            }
            for trial in self._trials.values()
        }

    def line(self) -> str:
        """One line for the user, such as "Choices: look-ahead off (tried), reads direct (yours)"."""
        by = {"you": "yours", "trial": "tried", "default": "default"}
        found = [
            f"{_named(name, told['choice'])} ({'being tried' if told['trying'] else by[told['by']]})"
            for name, told in self.choices().items()
        ]
        return f"Choices: {', '.join(found)}"

    # -- one comparison after the other ----------------------------------------------------------------------

    def _begin(self) -> None:
        """Begins the next comparison, unless nothing was read since the last one: then none of the options matters."""
        missed, self._missed = self._missed, 0
        if not missed:
            self._left = WARM_UP
            return
        while not self._candidates:
            if not self._queue:
                self._queue, self._left = [each for each in self._trials.values() if each.open], TERM
                return
            following = self._queue.pop(0)
            if following.open:
                self._now_trying = following
                self._candidates = [choice for choice in following.choices if choice != following.present]
        trial, candidate = self._now_trying, self._candidates[0]
        assert trial is not None
        if not trial.use(candidate):
            self._next(trial)
            return
        known = self._unfinished.get(trial.name, {})
        same = known.get("candidate") == candidate and known.get("against") == trial.present
        self._turns = PairedTurns(trial.settle, known["pairs"] if same else ())
        self._follow(self._turns)

    def _end(self, turns: PairedTurns, won: bool) -> None:
        trial, candidate = self._now_trying, self._candidates[0]
        assert trial is not None
        ratio = round(1 - gain(turns.pairs), 4)
        if won:
            trial.ratios = {name: value for name, value in trial.ratios.items() if name != str(candidate)}
            trial.ratios[str(trial.present)] = round(1 / max(ratio, LEAST_RATIO), 4)
            trial.keep(candidate)
        else:
            trial.ratios[str(candidate)] = ratio
            trial.use(trial.present)
        trial.tried_at = self._now()
        self._unfinished.pop(trial.name, None)
        self._changed = True
        self._next(trial)

    def _next(self, trial: Trial) -> None:
        """Ends the comparison with the first candidate. The results are kept when an option has no more of them."""
        del self._candidates[0]
        self._turns, self._left, self._missed = None, PAUSE, 0
        if not self._candidates:
            self._now_trying = None
            if self._changed:
                self._changed = False
                self._keep(self.results())

    def _follow(self, turns: PairedTurns) -> None:
        """Uses what the turns ask for."""
        trial = self._now_trying
        assert trial is not None
        if not trial.use(self._candidates[0] if turns.trying else trial.present):
            self._next(trial)

    # -- what an earlier process found -----------------------------------------------------------------------

    def _is_due(self, trial: Trial) -> bool:
        age = None if trial.tried_at is None else self._now() - trial.tried_at
        return trial.open and (age is None or not 0 <= age < LIFE_S)

    def _note_unfinished(self, trial: Trial, turns: PairedTurns) -> None:
        self._unfinished[trial.name] = {
            "candidate": self._candidates[0],
            "against": trial.present,
            "pairs": [round(each, 4) for each in turns.pairs],
        }

    def _remember(self, kept: dict[str, Any]) -> None:
        """Takes over earlier results, as far as they are in the expected form and about the same choices."""
        for name, result in _dict(kept.get("trials")).items():
            trial, result = self._trials.get(name), _dict(result)
            choice, at = result.get("choice"), result.get("tried_at")
            if trial is not None and trial.fixed:
                self._earlier[name] = result
            if trial is None or not trial.open or result.get("choices") != list(trial.choices):
                continue
            if not _is_among(choice, trial.choices) or not _is_number(at, most=LATEST):
                continue
            trial.ratios = {str(key): value for key, value in _dict(result.get("ratios")).items() if _is_number(value)}
            trial.tried_at = at
            trial.keep(choice)  # type: ignore[arg-type]  # it is one of the choices
        for name, found in _dict(kept.get("unfinished")).items():
            pairs = _dict(found).get("pairs")
            if name in self._trials and isinstance(pairs, list) and all(map(_is_number, pairs)):
                self._unfinished[name] = found


def _result(trial: Trial) -> dict[str, Any]:
    """What is kept of an option."""
    result = {"choice": trial.present, "ratios": dict(trial.ratios), "tried_at": trial.tried_at}
    return {**result, "choices": list(trial.choices)}


def _named(name: str, choice: Choice) -> str:
    """A choice in words."""
    if name == "threads":
        return f"{choice} threads"
    if name == "pieces":
        return f"pieces from {int(choice) >> 10} KiB"
    words = {"lookahead": "look-ahead", "io": "reads"}
    return f"{words.get(name, name)} {choice if isinstance(choice, str) else 'on' if choice else 'off'}"


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: Any, most: float = 100) -> bool:
    return type(value) in (int, float) and abs(value) < most


def _is_among(value: Any, choices: Sequence[Choice]) -> bool:
    """Whether a value is one of the choices. True is not 1 here."""
    return any(value == choice and type(value) is type(choice) for choice in choices)
