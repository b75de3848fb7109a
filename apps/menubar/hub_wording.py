"""The texts of the window that searches the Hub and downloads, made from its state, without a GUI toolkit."""

from __future__ import annotations

import textwrap

import psutil

from .downloads import BROKEN, DISCARDING, DONE, LOADING, PAUSED, Download, Found, HubState, Verdict
from .wording import size_text

LINE_CHARACTERS = 96
LINES = 4
FOR_TERMINALS = " Run the same command again to continue."  # ends an error; the window has a button for that


def row(found: Found, state: HubState) -> tuple[str, str, str]:
    """(name, size, downloads) of a model in the list."""
    times = "" if found.downloads is None else count_text(found.downloads)
    if found.downloads is None and found.name in state.unfinished:
        times = "not finished"
    return found.name, "" if found.size_bytes is None else size_text(found.size_bytes), times


def wrapped(text: str) -> str:
    """The text in lines, because a label does not wrap."""
    lines = textwrap.wrap(text, LINE_CHARACTERS, max_lines=LINES, placeholder=" …", break_on_hyphens=False)
    return "\n".join(lines)


def count_text(count: int) -> str:
    for limit, unit in ((10**6, "M"), (10**3, "k")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return str(count)


def search_note(state: HubState) -> str:
    if state.search_trouble:
        return state.search_trouble
    if state.searching:
        return "Searching"
    if not state.text:
        return "Downloads that were begun" if state.found else "Search for a part of a name, or type owner/name."
    if not state.found:
        return f"The Hub has no model with {state.text!r:.40} in its name that runs here."
    return "" if len(state.found) > 1 else "One model"


def verdict_lines(state: HubState, machine_bytes: int | None = None) -> tuple[str, str]:
    """(size and room, whether it runs) of the chosen model. machine_bytes: of memory; None for this machine's."""
    if not state.chosen:
        return "", "Choose a model to see how large it is, and whether it runs here."
    verdict = state.verdict
    size = "" if verdict is None else size_line(verdict)
    if state.looking:
        return size, f"Looking at {state.chosen}: its headers say what it needs"
    if verdict is None or not verdict.complete:
        return size, state.reason
    if verdict.converts:
        return size, "It is converted when it is first started. Its budgets are known after that."
    assert verdict.smallest is not None and verdict.everything is not None
    machine = psutil.virtual_memory().total if machine_bytes is None else machine_bytes
    needs = f"smallest budget {size_text(verdict.smallest)}, all of it in memory {size_text(verdict.everything)}"
    if verdict.smallest > machine:
        return size, f"Does not fit into this machine's {size_text(machine)}: {needs}."
    return size, f"Fits into this machine's {size_text(machine)}: {needs}."


def size_line(verdict: Verdict) -> str:
    size = f"Size {size_text(verdict.nbytes)}"
    if not verdict.missing:
        return f"{size}, already downloaded"
    missing = "" if verdict.missing == verdict.nbytes else f", {size_text(verdict.missing)} still to download"
    room = f"{size_text(verdict.free)} free on the disk"
    return f"{size}{missing}; {room}" + (", too little" if verdict.missing > verdict.free else "")


def can_download(state: HubState) -> bool:
    """Whether the verdict on the chosen model lets it be downloaded."""
    verdict, now = state.verdict, state.download
    busy = now.phase == DISCARDING or (now.phase == LOADING and now.name == state.chosen)
    fits = verdict is not None and verdict.complete and 0 < verdict.missing <= verdict.free
    return fits and not busy and not (now.name == state.chosen and now.phase == DONE)


def is_here(state: HubState) -> bool:
    """Whether the chosen model is downloaded, so that it can be started."""
    verdict, now = state.verdict, state.download
    done = now.name == state.chosen and now.phase == DONE
    return bool(state.chosen) and (done or (verdict is not None and verdict.complete and not verdict.missing))


def download_button(state: HubState) -> str:
    if state.download.phase == LOADING and state.download.name == state.chosen:
        return "Pause"
    return "Continue" if state.chosen in state.unfinished else "Download"


def can_discard(state: HubState) -> bool:
    now = state.download
    return now.phase in (LOADING, PAUSED, BROKEN) or (now.phase != DISCARDING and state.chosen in state.unfinished)


def download_line(download: Download) -> str:
    """The progress of a download in a line."""
    if not download.name:
        return ""
    far = f"{size_text(download.done)} of {size_text(download.total)}" if download.total else "beginning"
    if download.phase == DONE:
        return f"{download.name} is downloaded."
    if download.phase == DISCARDING:
        return f"Removing what has arrived of {download.name}"
    if download.phase == BROKEN:
        return f"{download.name} stopped at {far}: {download.trouble.removesuffix(FOR_TERMINALS)}"
    if download.phase == PAUSED:
        return f"{download.name}: paused at {far}"
    parts = [f"{download.name}: {far}"]
    if download.rate is not None:
        parts.append(f"{size_text(download.rate)}/s")
    if download.seconds_left is not None:
        parts.append(f"{duration_text(download.seconds_left)} left")
    return " · ".join(parts)


def duration_text(seconds: float) -> str:
    """40 s, 12 min, 3 h 5 min"""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def share_done(download: Download) -> float:
    return min(1.0, download.done / download.total) if download.total else 0.0
