"""Starts the processes of the runs, one after the other, and keeps the time limit."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import BudgetError, FlashError, UsageError
from ..flash.swap import SwapCounters, swap_counters
from ..source.children import TERMINATED_S, child_environment
from .form import BudgetName, Energy, LeftOut, Reason, ReportedAnswer, ReportedRun, State
from .pasted import figure

Told = dict[str, Any]
STATES: tuple[State, ...] = ("cold", "warm")
Lines = Callable[[Told, float | None], Generator[Told]]
ANSWER_SHARE = 1 / 16  # of the whole time limit, for the tokens of one answer after the first
LEAST_S = 3.0  # of answering, without which a run is not begun
GRACE_S = 3.0  # after the limit, for a run that is about to end


def lines_of(request: Told, seconds: float | None) -> Generator[Told]:
    """What the process of `one_run` answers to a request. It is ended when the iterator is closed.

    seconds: until it is ended; None for no limit. Raises FlashError if it ends by itself without having answered all,
    TimeoutError if its time is over.
    """
    end = None if seconds is None else time.monotonic() + seconds
    child = subprocess.Popen(
        [sys.executable, "-m", f"{__package__}.one_run"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=child_environment(), text=True,
        start_new_session=True,  # Ctrl-C is for this process alone, which then ends the child.
    )  # fmt: skip
    assert child.stdin is not None and child.stdout is not None
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    reader = threading.Thread(target=_read, args=(child.stdout, lines), daemon=True)
    try:
        reader.start()
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
        while line := _next(lines, end):
            told = json.loads(line)
            if "error" in told:
                raise _error_of(told)
            yield told
        if code := child.wait():
            raise FlashError(f"the process of a run ended with exit code {code} (see above).")
    finally:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(TERMINATED_S)
        child.kill()
        child.wait()
        child.stdin.close()
        reader.join()
        child.stdout.close()


def _error_of(told: Told) -> FlashError:
    """The error that a child told, of the kinds that make a difference here."""
    if told["kind"] == "BudgetError":
        return BudgetError(told["error"], 0)
    return (UsageError if told["kind"] == "UsageError" else FlashError)(told["error"])


def _read(source: Any, lines: queue.SimpleQueue[str]) -> None:
    for line in source:
        lines.put(line)
    lines.put("")


def _next(lines: queue.SimpleQueue[str], end: float | None) -> str:
    """The next line, or "" at the end. Raises TimeoutError."""
    try:
        return lines.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
    except queue.Empty:
        raise TimeoutError from None


@dataclass
class Measured:
    """What the runs have told so far. ids: (prompt tokens, budget, token ids of an answer)."""

    runs: list[ReportedRun] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    ids: list[tuple[int, BudgetName, list[int]]] = field(default_factory=list)
    energy: Energy = "not available"


@dataclass(frozen=True)
class Course:
    """Which runs there are, in this order: each prompt within each budget.

    prompts, tokens: numbers of tokens. limit_s: seconds of the whole report. end: when they are over, by
    time.monotonic().
    """

    model: str | None
    context: int
    prompts: tuple[int, ...]
    tokens: int
    budgets: dict[BudgetName, int]
    limit_s: float
    end: float
    lines: Lines = lines_of

    @property
    def steps(self) -> list[tuple[int, BudgetName]]:
        """(prompt tokens, budget): first what says most if nothing follows, the short prompt and the middle budget."""
        names = sorted(self.budgets, key=lambda name: name != "middle")
        ranked = [(p + b, p, b) for p in range(len(self.prompts)) for b in range(len(names))]
        return [(self.prompts[p], names[b]) for _, p, b in sorted(ranked)]

    def run(self, measured: Measured, say: Callable[[str], None]) -> None:
        """Runs all, and adds to `measured` as it goes, so that an interruption leaves what there is."""
        longest_load_s = 0.0
        steps = self.steps
        for number, (prompt, budget) in enumerate(steps):
            told: list[Told] = []
            left_s = self.end - time.monotonic()
            about = (
                f"run {number + 1} of {len(steps)}: {self.budgets[budget] / 1e9:.2f} GB, a prompt of {prompt} tokens"
            )
            if left_s < longest_load_s + LEAST_S:
                say(f"{about}: left out, because the time is over")
                self._leave_out(measured, prompt, budget, 0, "time")
                continue
            say(f"{about} ({left_s:.0f} s left)")
            reason: Reason = "interrupted"
            before = swap_counters()
            try:
                reason = self._ask(prompt, budget, left_s, told, say)
            finally:
                self._add(measured, prompt, budget, told, before)
                self._leave_out(measured, prompt, budget, max(0, len(told) - 1), reason)
            longest_load_s = max(longest_load_s, told[0]["load_s"] if told else 0.0)

    def _ask(
        self, prompt: int, budget: BudgetName, left_s: float, told: list[Told], say: Callable[[str], None]
    ) -> Reason:
        """Fills `told` with the lines of one run. Returns why answers may be missing."""
        request = {
            "work": "run", "model": self.model, "memory": self.budgets[budget], "context": self.context,
            "prompt_tokens": prompt, "tokens": self.tokens, "answer_s": ANSWER_SHARE * self.limit_s, "left_s": left_s,
        }  # fmt: skip
        try:
            with contextlib.closing(self.lines(request, left_s + GRACE_S)) as lines:
                for line in lines:
                    told.append(line)
                    if "state" in line:
                        say(
                            f"  {line['state']}: first token after {line['first_token_s']:.2f} s, "
                            f"{figure(line['tokens_per_second'])} tokens per second"
                        )
        except BudgetError as error:
            say(f"  left out: {error}")
            return "memory"
        except FlashError as error:
            say(f"  failed: {error}")
            return "failed"
        except TimeoutError:
            say("  ended, because the time is over")
        return "time"

    def _add(self, measured: Measured, prompt: int, budget: BudgetName, told: list[Told], before: SwapCounters) -> None:
        if len(told) < 2:
            return
        moved = asdict(swap_counters() - before)
        answers = []
        for line in told[1:]:
            answer = dict(line)
            measured.ids.append((prompt, budget, answer.pop("ids")))
            if (source := answer.pop("energy")) != "not available":
                measured.energy = source
            choices = answer.pop("choices")
            answers.append(ReportedAnswer(**answer))
        counted = {f"{name}_bytes": max(0, count) for name, count in moved.items()}
        run = {"budget": budget, "prompt_tokens": prompt, "answers": answers, "choices": choices}
        measured.runs.append(ReportedRun(**run, **told[0], **counted))

    def _leave_out(self, measured: Measured, prompt: int, budget: BudgetName, done: int, reason: Reason) -> None:
        for state in STATES[done:]:
            measured.left_out.append(LeftOut(budget=budget, prompt_tokens=prompt, state=state, reason=reason))

    def leave_out_rest(self, measured: Measured, reason: Reason) -> None:
        """Notes the runs that were neither made nor left out."""
        known = {(run.prompt_tokens, run.budget) for run in measured.runs}
        known |= {(left.prompt_tokens, left.budget) for left in measured.left_out}
        for prompt, budget in self.steps:
            if (prompt, budget) not in known:
                self._leave_out(measured, prompt, budget, 0, reason)
