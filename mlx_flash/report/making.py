"""Makes a report, step by step: the model, the machine, the runs. What is there can be taken at any time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__
from ..errors import UsageError
from .form import MachineReport, Reason, ReportedBudget, ReportedModel, in_words
from .machine_facts import machine_of
from .runs_apart import Course, Lines, Measured, lines_of
from .same_tokens import compared


class Scope(NamedTuple):
    """How much is measured. prompts, tokens: numbers of tokens of the prompts, and of each answer. limit_s: seconds in
    all, after a download or a conversion."""

    prompts: tuple[int, ...]
    tokens: int
    limit_s: float


FULL, QUICK = Scope((32, 512), 128, 600.0), Scope((32,), 32, 120.0)
END_S = 10.0  # of the time limit, for ending a run and writing the files


class Making:
    """A report in the making. gather: gives the doctor's facts of the machine, for the folder of the model."""

    def __init__(
        self,
        model: str | None,
        quick: bool,
        say: Callable[[str], None],
        gather: Callable[[Path, Callable[[str], None]], dict[str, Any]],
        lines: Lines = lines_of,
    ) -> None:
        self._model, self._quick, self._say, self._gather = model, quick, say, gather
        self._lines = lines
        self._scope = QUICK if quick else FULL
        self._began = time.monotonic()
        self._model_facts: ReportedModel | None = None
        self._budgets: list[ReportedBudget] = []
        self._facts: dict[str, Any] | None = None
        self._course: Course | None = None
        self._measured = Measured()

    def make(self) -> None:
        """Raises the errors of `load` if the model cannot be run here at all."""
        folder = self._examine()
        self._say("looking at the machine and its disk")
        self._facts = self._gather(folder, lambda part: self._say(f"  {part}"))
        assert self._course is not None
        self._course.run(self._measured, self._say)

    def _examine(self) -> Path:
        """Fills in the model and its budgets. Returns its folder."""
        scope = self._scope
        self._say("preparing the model (a download or a conversion does not count as time of the report)")
        asked = {"work": "examine", "model": self._model, "context": max(scope.prompts) + scope.tokens}
        with contextlib.closing(self._lines(asked, None)) as lines:
            folder = Path(next(lines)["folder"])
            self._began = time.monotonic()
            self._say("planning the budgets, and forecasting the speed within them")
            told = next(lines)
        self._model_facts = ReportedModel(**told["model"])
        self._budgets = [ReportedBudget(**budget) for budget in told["budgets"]]
        context = self._model_facts.context
        if context <= scope.tokens:
            raise UsageError(f"this model has room for {context} tokens, expected more than {scope.tokens}.")
        prompts = sorted({min(prompt, context - scope.tokens) for prompt in scope.prompts})
        self._course = Course(
            self._model,
            context,
            tuple(prompts),
            scope.tokens,
            {budget.name: budget.bytes for budget in self._budgets},
            scope.limit_s,
            self._began + scope.limit_s - END_S,
            self._lines,
        )
        return folder

    def leave_out_rest(self, reason: Reason) -> None:
        """Notes why the runs that are missing are missing."""
        if self._course is not None:
            self._course.leave_out_rest(self._measured, reason)

    def report(self) -> MachineReport | None:
        """What there is; None if not even the model is known yet."""
        if self._course is None or self._model_facts is None:
            return None
        return MachineReport(
            made=date.today().isoformat(),
            seconds=time.monotonic() - self._began,
            quick=self._quick,
            version=in_words(__version__) or "unknown",
            machine=None if self._facts is None else machine_of(self._facts),
            model=self._model_facts,
            budgets=self._budgets,
            prompts=list(self._course.prompts),
            tokens=self._course.tokens,
            energy=self._measured.energy,
            runs=self._measured.runs,
            left_out=self._measured.left_out,
            same_text=compared(self._measured.ids),
        )
