"""The texts of the menu, made from the controller's state, without a GUI toolkit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil

from .budgets import Budget
from .controller import FAILED, RUNNING, STARTING, STOPPED, STOPPING, State

LINE_CHARACTERS = 72  # A menu is as wide as its longest line.
WIDTH = 50  # characters of the first line while the model answers
SIGNS = {"loading": "...", "unloaded": "zzz", "failed": "!"}  # what the running server does with its model
MARK, NO_MARK = "✓ ", "    "  # toga's commands have no check marks.


def icon_text(state: State) -> str:
    """At most four characters for the menu bar: tokens per second of a running request, else a sign of the phase."""
    if state.phase == RUNNING:
        if (served := SIGNS.get(state.served)) is not None:
            return served
        rate = state.tokens_per_second
        return "on" if rate is None else rate_text(rate)
    return {STOPPED: "off", STARTING: "...", STOPPING: "...", FAILED: "!"}[state.phase]


def rate_text(rate: float) -> str:
    """The rate in at most three digits: 0.42, 9.4, 83, 120."""
    for digits, limit in ((2, 0.995), (1, 9.95)):
        if rate < limit:
            return f"{rate:.{digits}f}"
    return f"{rate:.0f}" if rate < 999.5 else "999"


def headline(state: State) -> str:
    """The menu's first line."""
    if state.phase == STOPPED:
        return "Stopped"
    if state.phase == STOPPING:
        return "Stopping"
    if state.phase == STARTING:
        return shortened(f"Starting: {state.progress}" if state.progress else "Starting")
    if state.phase == FAILED:
        return shortened(state.trouble)
    if state.served in SIGNS:
        return shortened(_without_model(state))
    now = (state.stats or {}).get("now")
    if isinstance(now, dict):
        if (rate := state.tokens_per_second) is None or not now.get("generated_tokens"):
            return "Reading the prompt"
        return " · ".join([f"{rate_text(rate)} tokens per second", *_reading(now)])
    last = (state.stats or {}).get("last")
    if isinstance(last, dict) and last.get("tokens_per_second"):
        return f"Ready · last answer {rate_text(last['tokens_per_second'])} tokens per second"
    return "Ready"


def _without_model(state: State) -> str:
    """What a running server without a model does."""
    if state.served == "unloaded":
        return "Asleep: the next question loads the model"
    library = state.library or {}
    if state.served == "failed":
        return f"Not loaded: {library.get('failure') or 'the server does not say why'}"
    loading = ((state.stats or {}).get("library") or {}).get("loading") or library.get("loading") or {}
    share = f" {loading['done'] / loading['total']:.0%}" if loading.get("total") else ""
    stage = f": {loading['stage']}" if loading.get("stage") else ""
    return f"Loading {loading.get('name', 'the model')}{stage}{share}"


def padded(line: str) -> str:
    """The line padded to WIDTH, because with Qt an open menu does not grow, or grows off the screen."""
    return line.ljust(WIDTH, "\u2002")  # en spaces, about as wide as a letter


def start_or_stop(state: State) -> str:
    return {STOPPED: "Start the engine", FAILED: "Start the engine again"}.get(state.phase, "Stop the engine")


def model_name(model: str | None) -> str:
    if model is None:
        return "Demo model"
    return Path(model).name if Path(model).is_absolute() else model


def model_label(model: str | None, state: State) -> str:
    return (MARK if model == state.settings.model else NO_MARK) + model_name(model)


def budgets_of(state: State) -> list[Budget | None]:
    """The budgets in the menu; None for the automatic one. A chosen one is among them, whatever the plan says."""
    chosen = state.settings.budget
    others = {budget.size: budget for budget in state.budgets}
    if chosen is not None:
        others.setdefault(chosen, Budget(chosen, ""))
    return [None, *(others[size] for size in sorted(others))]


def budget_label(budget: Budget | None, state: State, free: int | None = None) -> str:
    """The menu line of a budget. budget: None for the automatic one. free: available memory in bytes."""
    chosen = state.settings.budget == (budget.size if budget else None)
    text = "Automatic: a share of free memory" if budget is None else size_text(budget.size)
    if budget is not None and budget.note:
        text += f": {budget.note}"
    if budget is not None and free is not None and budget.size > free:
        text += " (more than is free)"
    return (MARK if chosen else NO_MARK) + text


def free_memory(state: State) -> int:
    """Bytes available to an engine that is started now; a running one would end first."""
    used = (state.stats or {}).get("memory", {}).get("current_bytes", 0)
    return psutil.virtual_memory().available + int(used)


def size_text(size: float) -> str:
    if size >= 10**9:
        return f"{size / 1e9:.3g} GB"
    return f"{size / 1e6:.0f} MB" if size >= 10**6 else f"{size / 1e3:.0f} kB"


def statistics(state: State) -> list[tuple[str, str]]:
    """(name, value) of each row in the statistics window."""
    rows = [("Engine", headline(state)), ("Model", state.settings.model or "Demo model"), ("Endpoint", state.endpoint)]
    stats = state.stats
    if stats is None:
        return rows
    memory, resident, totals, model = stats["memory"], stats.get("resident"), stats["totals"], stats.get("model")
    budget = memory.get("budget_bytes")
    rows += [
        ("Memory", size_text(memory["current_bytes"]) + ("" if budget is None else f" of {size_text(budget)}")),
        ("Peak memory", size_text(memory["peak_bytes"])),
    ]
    if model is not None and resident is not None:
        rows.append((f"Resident {model['kind']}", f"{resident['share']:.0%}"))
    rows += [
        ("Requests", f"{totals['requests']}, {totals['failed']} failed, {stats['queue']['waiting']} waiting"),
        ("Tokens", f"{totals['prompt_tokens']} read, {totals['generated_tokens']} written"),
        ("Read from the SSD", size_text(totals["bytes_read"])),
    ]
    request, title = (stats["now"], "now") if stats.get("now") else (stats.get("last"), "last answer")
    if request:
        if request.get("tokens_per_second"):
            rows.append((f"Tokens per second, {title}", rate_text(request["tokens_per_second"])))
        rows += [(f"{name[0].upper()}{name[1:]}, {title}", value) for name, value in _details(request)]
    return rows


def _details(request: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if request.get("hit_rate") is not None:
        rows.append(("hit rate", f"{request['hit_rate']:.1%}"))
    if request.get("bytes_per_token") is not None:
        rows.append(("read per token", size_text(request["bytes_per_token"])))
    for key, name in (("wait_s", "waiting for the SSD"), ("manage_s", "book-keeping"), ("compute_s", "computing")):
        if request.get(key) is not None:
            rows.append((f"{name} per token", f"{1e3 * request[key]:.2f} ms"))
    return rows


def _reading(now: dict[str, Any]) -> list[str]:
    parts = []
    if now.get("bytes_per_token") is not None:
        parts.append(f"{size_text(now['bytes_per_token'])} per token")
    if now.get("hit_rate") is not None:
        parts.append(f"hits {now['hit_rate']:.0%}")
    return parts


def shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LINE_CHARACTERS else text[: LINE_CHARACTERS - 1].rstrip() + "…"
