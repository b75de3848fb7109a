"""Keeps a model's weights and slots in memory on macOS, where the system would otherwise compress and swap them.

MLX wires its buffers up to a limit, which is 0 until a program sets it (`mx.set_wired_limit`; Metal, from macOS 15 on).
A buffer that is allocated when the limit is used up is not wired. So everything that stays is allocated first, and the
limit is its sum: later buffers, which come and go with every token, stay outside.
"""

from __future__ import annotations

import platform

import mlx.core as mx

from .swap import SwapCounters

HEAP_BYTES = 1 << 20  # of MLX's heap for the smallest arrays, which is wired as a whole
PAGE_BYTES = 16 << 10  # a small buffer may take a whole page
LEAST_LEFT = 4 << 30  # bytes of the machine's memory that `auto` leaves unwired, and
LEFT_SHARE = 0.25  # at least this share of it
MUCH_SWAPPED = 64 << 20  # bytes within one answer
MUCH_COMPRESSED = 0.1  # of the model's bytes, within one answer


class Wiring:
    """The wired limit of a loaded model, which `close` sets back. Limits of several models add up."""

    _open: list[Wiring] = []  # noqa: RUF012  # the models whose memory is wired, in this process
    _before = 0  # the limit before the first of them

    def __init__(self, arrays: int) -> None:
        """Measures a model whose weights and slots were just allocated. arrays: number of its arrays."""
        others = sum(each.nbytes for each in Wiring._open)
        self.nbytes: int = max(0, mx.get_active_memory() - others) + HEAP_BYTES + PAGE_BYTES * arrays

    def wire(self, careful: bool) -> str | None:
        """Raises the limit by the model's bytes. Returns the reason why not, if it cannot.

        careful: whether to leave enough memory to other programs. Nothing may be computed meanwhile.
        """
        if (reason := why_not_wired()) is not None:
            return reason
        total = self.nbytes + sum(each.nbytes for each in Wiring._open)
        device = mx.device_info()
        most = int(device["max_recommended_working_set_size"])
        if careful:
            memory = int(device["memory_size"])
            most = min(most, memory - max(LEAST_LEFT, int(LEFT_SHARE * memory)))
        if total > most:
            return f"{total / 1e9:.1f} GB would be wired, more than {most / 1e9:.1f} GB"
        mx.synchronize()
        mx.clear_cache()  # Its buffers would be wired as well.
        before = mx.set_wired_limit(total)
        if not Wiring._open:
            Wiring._before = before
        Wiring._open.append(self)
        return None

    def close(self) -> None:
        """Sets the limit back. May be called again."""
        if self in Wiring._open:
            Wiring._open.remove(self)
            mx.synchronize()
            rest = sum(each.nbytes for each in Wiring._open)
            mx.set_wired_limit(rest if Wiring._open else Wiring._before)

    def suffers(self, swap: SwapCounters) -> bool:
        """Whether the system swapped or compressed so much while an answer was generated that wiring may help."""
        return swap.swapped_out >= MUCH_SWAPPED or swap.compressed >= MUCH_COMPRESSED * self.nbytes


def why_not_wired() -> str | None:
    """The reason why MLX cannot wire memory here; None if it can."""
    version = platform.mac_ver()[0]
    if not version or mx.default_device() == mx.cpu:
        return "only Metal wires memory"
    if int(version.split(".")[0] or 0) < 15:
        return f"macOS {version} does not wire MLX's memory; macOS 15 does"
    return None
