"""The state and the totals of the engine, for /stats and for event streams."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

from ..flash.stats import Counters, Statistics
from .cache_watch import CacheWatch
from .events import EventHub
from .jobs import Job

if TYPE_CHECKING:
    from ..text.generation import FlashResponse

SHORTEST_EVENT_GAP_S = 0.05
SPEED_OVER_S = 2.0  # The speed shown is the mean of the tokens of this time.
NO_TOTALS: dict[str, float] = {
    **dict.fromkeys(("requests", "failed", "prompt_tokens", "generated_tokens", "bytes_read"), 0),
    **dict.fromkeys(("drafted_tokens", "accepted_tokens"), 0),
    "seconds_generating": 0.0,
}


class Monitor:
    """Records what the engine does. The engine's thread writes; any thread may read, as values are replaced whole.

    last: the last request that ended. now: the one that made the newest token, or whose prompt is read.
    """

    def __init__(self, model: Any, hub: EventHub, totals: dict[str, float] | None = None) -> None:
        """totals: those of the models before this one."""
        self.live = CacheWatch(model)
        self.hub = hub
        self.totals = totals or NO_TOTALS
        self.last: dict[str, Any] | None = None
        self.now: dict[str, Any] | None = None
        self.running = 0
        self._counters: Counters = model.flash.streamer.counters
        self._bytes_counted = 0  # how many of the counters' bytes are in the totals

    def begin(self, job: Job) -> RequestWatch:
        if not self.running:
            self._bytes_counted = self._counters.bytes
        self.running += 1
        return RequestWatch(self, job)

    def end(self, failed: bool, seconds: float) -> dict[str, float]:
        """Notes the end of a request. Returns the new totals, without its tokens."""
        totals = dict(self.totals)
        totals["requests"] += 1
        totals["failed"] += failed
        totals["seconds_generating"] += seconds
        totals["bytes_read"] += self._counters.bytes - self._bytes_counted
        self._bytes_counted = self._counters.bytes
        self.running -= 1
        return totals


class RequestWatch:
    """Records one request for the monitor. cached: tokens of its prompt that are in the cache already."""

    def __init__(self, monitor: Monitor, job: Job) -> None:
        self._monitor, self._job, self.cached = monitor, job, 0
        self._began = time.perf_counter()
        self._response: FlashResponse | None = None
        self._shown = Counters()  # counts of the decoded tokens that events have reported
        self._shown_tokens = 0
        self._event_at = 0.0
        self._times: deque[float] = deque()

    def prompt(self, done: int) -> None:
        """Records the progress of a prompt. done: tokens read, without the cached ones."""
        self._monitor.live.watch(self._monitor.hub.listening)
        self._monitor.live.forget()
        job, done = self._job, self.cached + done
        self._monitor.now = {
            **{"id": job.id, "tokens_per_second": 0.0, "generated_tokens": 0},
            **{"prompt_tokens": len(job.ids), "prompt_done": done},
            **_means(None),
        }
        self._monitor.hub.publish("state", {"state": "prompt", "id": job.id, "done": done, "total": len(job.ids)})

    def token(self, response: FlashResponse) -> None:
        assert response.statistics is not None
        first = self._response is None
        self._response = response
        job, count = self._job, response.generation_tokens
        total = len(job.ids)
        if first:
            self._monitor.hub.publish("state", {"state": "generating", "id": job.id, "done": total, "total": total})
        at = time.perf_counter()
        self._times.append(at)
        while at - self._times[0] > SPEED_OVER_S and len(self._times) > 2:
            self._times.popleft()
        gaps = len(self._times) - 1
        speed = gaps / (at - self._times[0]) if gaps else 0.0
        self._monitor.now = {
            **{"id": job.id, "tokens_per_second": speed, "generated_tokens": count},
            **{"prompt_tokens": total, "prompt_done": total},
            **_means(response.statistics),
        }
        if not self._monitor.hub.listening:
            self._monitor.live.watch(False)
        elif at - self._event_at >= SHORTEST_EVENT_GAP_S or response.finish_reason is not None:
            self._event_at = at
            self._publish_tokens(response.statistics, count, speed)

    def _publish_tokens(self, statistics: Statistics, count: int, speed: float) -> None:
        """Publishes an event for the tokens since the last one: means per token, and the state of the units."""
        between = Statistics(Counters(), statistics.decode - self._shown, count - self._shown_tokens, 0.0)
        self._shown, self._shown_tokens = statistics.decode, count
        means = _means(between)
        means["bytes"] = means.pop("bytes_per_token")
        layers = self._monitor.live.layers() if self._monitor.live.watching else []
        self._monitor.live.watch(True)  # A new listener gets units from the next event on.
        self._monitor.hub.publish(
            "token", {"id": self._job.id, "n": count, "tokens_per_second": speed, **means, "layers": layers}
        )

    def end(self, failed: bool) -> None:
        response = self._response
        totals = self._monitor.end(failed, time.perf_counter() - self._began)
        if response is not None:
            assert response.statistics is not None
            totals["prompt_tokens"] += len(self._job.ids)
            totals["generated_tokens"] += response.generation_tokens
            drafts = response.statistics.drafts
            drafted, accepted = (drafts.drafted, drafts.accepted) if drafts is not None else (0, 0)
            totals["drafted_tokens"] += drafted
            totals["accepted_tokens"] += accepted
            self._monitor.last = {
                "tokens_per_second": response.generation_tps,
                "prompt_tokens": len(self._job.ids),
                "generated_tokens": response.generation_tokens,
                "first_token_s": response.statistics.first_token_s,
                "drafted_tokens": drafted,
                "accepted_tokens": accepted,
                **_means(response.statistics),
            }
        self._monitor.totals = totals
        if self._monitor.running:
            return
        self._monitor.now = None
        self._monitor.hub.publish("state", {"state": "idle", "id": self._job.id, "done": 0, "total": 0})


def _means(statistics: Statistics | None) -> dict[str, Any]:
    """The means per decoded token; zeros and None without any."""
    if statistics is None:
        return {
            "hit_rate": None,
            "bytes_per_second": None,
            "ranks": None,
            **dict.fromkeys(("bytes_per_token", "wait_s", "manage_s", "compute_s"), 0.0),
        }
    each = statistics.per_token()
    return {
        "hit_rate": statistics.hit_rate,
        "bytes_per_second": statistics.bytes_per_second,
        "ranks": statistics.of_ranks(),
        **{name: each[name] for name in ("bytes_per_token", "wait_s", "manage_s", "compute_s")},
    }
