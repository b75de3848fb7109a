"""/metrics: the figures of /stats in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

TOTALS = {
    "requests": "Requests that were begun.",
    "failed": "Requests that ended in an error.",
    "prompt_tokens": "Tokens of prompts, cached ones included.",
    "generated_tokens": "Tokens generated.",
    "drafted_tokens": "Tokens drafted.",
    "accepted_tokens": "Drafted tokens that were accepted.",
    "bytes_read": "Bytes of units read from the disk.",
    "seconds_generating": "Seconds spent on requests.",
}
GIVEN_BACK = "Planned slots that the system has while it is short of memory."
LAST = {
    "tokens_per_second": "Tokens per second of the last request that ended.",
    "first_token_s": "Seconds until the first token of the last request that ended.",
    "hit_rate": "Share of needed units that were in a slot, in the last request that ended.",
    "bytes_per_token": "Bytes read per token in the last request that ended.",
}


def exposition(stats: dict[str, Any]) -> bytes:
    """The metrics as Prometheus text. stats: the answer of /stats."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(stats))
    return generate_latest(registry)


class _Snapshot(Collector):
    def __init__(self, stats: dict[str, Any]) -> None:
        self.stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self.stats
        for name, text in TOTALS.items():
            yield CounterMetricFamily(f"mlx_flash_{name}", text, value=stats["totals"][name])
        for name, text in LAST.items():
            if stats["last"] is not None and stats["last"][name] is not None:
                yield GaugeMetricFamily(f"mlx_flash_last_{name}", text, value=stats["last"][name])
        library, resident, given_back = stats["library"], stats["resident"], stats["given_back"]
        yield CounterMetricFamily("mlx_flash_loads", "Models that were loaded.", value=library["loads"])
        yield CounterMetricFamily("mlx_flash_unloads", "Models that were closed.", value=library["unloads"])
        for name, text, value in (
            ("model_loaded", "Whether a model is loaded.", int(stats["model"] is not None)),
            ("requests_running", "Requests that are running.", stats["queue"]["running"]),
            ("requests_parallel", "Requests that may run at once.", stats["queue"]["parallel"]),
            ("requests_waiting", "Requests in the queue.", stats["queue"]["waiting"]),
            ("memory_bytes", "Memory of this process.", stats["memory"]["current_bytes"]),
            ("memory_peak_bytes", "Peak memory of this process.", stats["memory"]["peak_bytes"]),
            ("memory_budget_bytes", "The memory budget.", stats["memory"]["budget_bytes"]),
            ("resident_share", "Share of all units that are in slots.", resident and resident["share"]),
            ("slots_given_back_bytes", GIVEN_BACK, given_back and given_back["now_bytes"]),
            ("uptime_seconds", "Seconds since the start.", stats["uptime_s"]),
        ):
            if value is not None:  # while no model is loaded
                yield GaugeMetricFamily(f"mlx_flash_{name}", text, value=value)
