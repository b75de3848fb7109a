"""Counters and timers: what was read, what was found in the cache, where the time went."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass
class Counters:
    """Sums over calls. Seconds are wall-clock; bytes are those asked of the file."""

    hits: int = 0  # blocks needed and found in a slot
    misses: int = 0  # blocks needed and read
    early: int = 0  # of the misses: read ahead, on a guess
    vain: int = 0  # blocks read ahead that were not needed
    reads: int = 0  # requests to the operating system, neighbours merged
    bytes: int = 0
    read_s: float = 0.0  # the device was busy
    wait_s: float = 0.0  # the model waited for reads: to be handed over, and to end
    manage_s: float = 0.0  # ids, maps, slots
    total_s: float = 0.0  # whole calls of the model

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def copy(self) -> Counters:
        return Counters(**asdict(self))


@dataclass(frozen=True)
class Statistics:
    """One generation: the prompt's counters and the decoded tokens' apart."""

    prompt: Counters
    decode: Counters
    decoded_tokens: int
    first_token_s: float

    @property
    def hit_rate(self) -> float | None:
        """Share of the needed blocks that were in a slot, while decoding; None if none was needed."""
        needed = self.decode.hits + self.decode.misses
        return self.decode.hits / needed if needed else None

    @property
    def bytes_per_second(self) -> float | None:
        """Read rate while the device was busy, while decoding."""
        return self.decode.bytes / self.decode.read_s if self.decode.read_s else None

    def per_token(self) -> dict[str, float]:
        """Means per decoded token; `compute_s` is what is left of the time."""
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
