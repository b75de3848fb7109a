"""Counters and timers: bytes read, cache hits, and where the time went."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields

from .swap import SwapCounters


@dataclass
class Counters:
    """Sums over calls. Seconds are wall-clock time; bytes are those requested from the file."""

    hits: int = 0  # blocks needed and found in a slot
    misses: int = 0  # blocks needed and read
    prefetched_used: int = 0  # units read on a guess that the next call needed; they count as misses
    prefetched_unused: int = 0  # units read on a guess that the next call did not need
    reads: int = 0  # requests to the operating system, after merging neighbours
    bytes: int = 0
    read_s: float = 0.0  # time when the disk was busy
    wait_s: float = 0.0  # time when the model submitted reads or waited for their end
    manage_s: float = 0.0  # time spent on ids, maps and slots
    total_s: float = 0.0  # time of whole calls of the model
    given_back: int = 0  # bytes of slots that the system got while it was short of memory
    taken_again: int = 0  # bytes of slots that came back later
    ranks_s: float = 0.0  # time when this process waited for what other ranks compute
    ranks_bytes: int = 0  # bytes that other ranks read

    @property
    def resized(self) -> bool:
        """Whether slots were given back or taken again."""
        return bool(self.given_back or self.taken_again)

    @property
    def early(self) -> int:
        """The deprecated name of `prefetched_used`."""
        return self.prefetched_used

    @property
    def vain(self) -> int:
        """The deprecated name of `prefetched_unused`."""
        return self.prefetched_unused

    def __add__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def __truediv__(self, count: int) -> Counters:
        """An equal share of each sum, so the counts may be fractions."""
        return Counters(*(getattr(self, f.name) / count for f in fields(self)))

    def copy(self) -> Counters:
        return Counters(**asdict(self))


class Clock:
    """Divides the time of one thread among the timers. Each span from one mark to the next counts once.

    A callee may charge its own spans. Its caller then charges only the time after them.
    """

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._mark = 0.0

    def start(self) -> None:
        """Starts a span. The time since the last mark is not counted here."""
        self._mark = time.perf_counter()

    def managed(self) -> None:
        """Charges the span since the last mark to ids, maps and slots."""
        self._counters.manage_s += self._span()

    def waited(self) -> None:
        """Charges the span since the last mark to waiting for reads."""
        self._counters.wait_s += self._span()

    def _span(self) -> float:
        mark, self._mark = self._mark, time.perf_counter()
        return self._mark - mark


@dataclass
class DraftCounts:
    """Drafts of a generation. kind: how they were made. depth: most drafts of a pass; 0 if there were none, because
    they had lost time before."""

    kind: str
    depth: int
    drafted: int = 0
    accepted: int = 0
    passes: int = 0  # over the weights, for the decoded tokens

    def __add__(self, other: DraftCounts) -> DraftCounts:
        """The sums, with the larger depth."""
        sums = (getattr(self, name) + getattr(other, name) for name in ("drafted", "accepted", "passes"))
        return DraftCounts(self.kind, max(self.depth, other.depth), *sums)

    def line(self, tokens: int) -> str:
        """A line for the user. tokens: number of decoded tokens."""
        if not self.depth:
            return f"Drafts ({self.kind}): none, because they did not save time before"
        share = f" ({self.accepted / self.drafted:.1%})" if self.drafted else ""
        return (
            f"Drafts ({self.kind}, up to {self.depth}): {self.accepted} of {self.drafted} accepted{share}, "
            f"{tokens / max(1, self.passes):.2f} tokens per pass"
        )


@dataclass(frozen=True)
class Statistics:
    """Statistics of one generation, with separate counters for the prompt and the decoded tokens.

    drafts: None if it was not set up for any. swap: what the system swapped and compressed meanwhile, for whatever
    program; None before the end of the generation.
    """

    prompt: Counters
    decode: Counters
    decoded_tokens: int
    first_token_s: float
    drafts: DraftCounts | None = None
    swap: SwapCounters | None = None

    def __add__(self, other: Statistics) -> Statistics:
        """The statistics of both generations together; `first_token_s` is the sum."""
        return Statistics(
            prompt=self.prompt + other.prompt,
            decode=self.decode + other.decode,
            decoded_tokens=self.decoded_tokens + other.decoded_tokens,
            first_token_s=self.first_token_s + other.first_token_s,
            drafts=self.drafts + other.drafts if self.drafts and other.drafts else self.drafts or other.drafts,
            swap=self.swap + other.swap if self.swap and other.swap else self.swap or other.swap,
        )

    @property
    def hit_rate(self) -> float | None:
        """Share of the needed blocks that were in a slot, while decoding; None if none was needed."""
        needed = self.decode.hits + self.decode.misses
        return self.decode.hits / needed if needed else None

    @property
    def bytes_per_second(self) -> float | None:
        """Read rate while decoding, over the time when the disk was busy; None if nothing was read."""
        return self.decode.bytes / self.decode.read_s if self.decode.read_s else None

    def per_token(self) -> dict[str, float]:
        """Means per decoded token; `compute_s` is the rest of the time."""
        n = max(1, self.decoded_tokens)
        d = self.decode
        return {
            "bytes_per_token": d.bytes / n,
            "reads_per_token": d.reads / n,
            "read_s": d.read_s / n,
            "wait_s": d.wait_s / n,
            "manage_s": d.manage_s / n,
            "compute_s": max(0.0, d.total_s - d.wait_s - d.manage_s) / n,
        }

    def of_ranks(self) -> dict[str, float] | None:
        """Means per decoded token of what other ranks cost: "wait_s", which is a part of `compute_s`, and
        "bytes_per_token", which they read. None if there are none."""
        if not self.decode.ranks_s:
            return None
        n = max(1, self.decoded_tokens)
        return {"wait_s": self.decode.ranks_s / n, "bytes_per_token": self.decode.ranks_bytes / n}

    def _ranks_line(self) -> list[str]:
        if (each := self.of_ranks()) is None:
            return []
        return [
            f"Other ranks: {each['bytes_per_token'] / 1e6:.3f} MB read per token; {1e3 * each['wait_s']:.2f} ms of the "
            "compute are spent waiting for them"
        ]

    def _slots_line(self) -> list[str]:
        both = self.prompt + self.decode
        if not both.resized:
            return []
        return [
            f"Memory: {both.given_back / 1e6:.0f} MB of slots given back while the system was short of memory, "
            f"{both.taken_again / 1e6:.0f} MB taken again"
        ]

    def lines(self, predictor: str) -> list[str]:
        """Lines for the user: the reads, where the time went, other ranks if there are any, the drafts if it was set up
        for them, the slots that came and went if any did, and swapping."""
        swapped = None if self.swap is None else self.swap.line()
        each = self.per_token()
        hits = "none needed" if self.hit_rate is None else f"{self.hit_rate:.1%} hits"
        rate = self.bytes_per_second
        speed = "no reads" if rate is None else f"{rate / 1e9:.3f} GB/s while reading"
        return [
            f"Streaming ({predictor}): {hits}, {each['bytes_per_token'] / 1e6:.3f} MB and "
            f"{each['reads_per_token']:.1f} reads per token, {speed}",
            f"Time per token: {1e3 * each['wait_s']:.2f} ms waiting for reads, {1e3 * each['manage_s']:.2f} ms cache "
            f"management, {1e3 * each['compute_s']:.2f} ms compute",
            *self._ranks_line(),
            *([self.drafts.line(self.decoded_tokens)] if self.drafts is not None else []),
            *self._slots_line(),
            *([] if swapped is None else [swapped]),
        ]
