"""What the system swapped while a model ran, and how it is told."""

from __future__ import annotations

import ctypes
import errno
import mmap
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from mlx_flash.flash import swap
from mlx_flash.flash.stats import Counters, Statistics
from mlx_flash.flash.swap import SwapCounters, swap_counters

MB = 10**6


def statistics(found: SwapCounters | None) -> Statistics:
    return Statistics(Counters(), Counters(), 1, 0.0, swap=found)


def test_only_swapping_is_mentioned() -> None:
    plain = statistics(None).lines("router")
    assert statistics(SwapCounters(compressed=5 * MB, swapped_in=MB)).lines("router") == plain
    (line,) = statistics(SwapCounters(swapped_out=300 * MB)).lines("router")[len(plain) :]
    assert line == "Swap: 300 MB were written to swap while this ran: lower --memory, or close other programs"
    assert "1 MB were" in statistics(SwapCounters(swapped_out=4096)).lines("router")[-1]


def test_counters_that_cannot_be_asked_for_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap.sys, "platform", "linux")
    before = swap_counters()

    def fail() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(psutil, "swap_memory", fail)
    assert swap_counters() == before


def test_generations_add_up() -> None:
    both = statistics(SwapCounters(1, 2, 3, 4)) + statistics(SwapCounters(10, 20, 30, 40))
    assert both.swap == SwapCounters(11, 22, 33, 44)
    assert (statistics(None) + statistics(SwapCounters(1))).swap == SwapCounters(1)
    assert (statistics(None) + statistics(None)).swap is None


def test_the_counters_of_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap.sys, "platform", "linux")
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(sin=3 * MB, sout=7 * MB))
    assert swap_counters() - SwapCounters(MB, MB) == SwapCounters(2 * MB, 6 * MB)


@pytest.mark.parametrize("refuses", [False, True])
def test_the_counters_of_macos(refuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel fills a structure of 38 words, whose places are those of Apple's header."""

    class Library:
        def mach_host_self(self) -> int:
            return 77

        def host_statistics64(self, host: int, flavor: int, found: Any, words: Any) -> int:
            assert (host, flavor, words._obj.value, ctypes.sizeof(found._obj)) == (77, 4, 38, 152)
            for place, pages in ((96, 4), (104, 3), (112, 1), (120, 2)):  # bytes: de-, compressions, swapped in, out
                ctypes.c_uint64.from_address(ctypes.addressof(found._obj) + place).value = pages
            return int(refuses)

    library = Library()
    monkeypatch.setattr(swap, "_mach", lambda: (library, library.mach_host_self()))
    monkeypatch.setattr(swap.sys, "platform", "darwin")
    page = mmap.PAGESIZE
    expected = SwapCounters() if refuses else SwapCounters(page, 2 * page, 3 * page, 4 * page)
    assert swap_counters() == expected
