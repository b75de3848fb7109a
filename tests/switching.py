"""A server with several models as the page sees it: /library, /events and /stats, written by a test."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route

GIB = 2**30


def library(state: str, loading: Any = None) -> dict[str, Any]:
    """An answer of GET /library."""

    def model(name: str, **fields: Any) -> dict[str, Any]:
        return {
            **{"name": name, "source": "cache", "size_bytes": GIB, "loaded": False, "runs": True, "reason": ""},
            **{"smallest_bytes": 300_000_000, "everything_bytes": 2_000_000_000, "images": False},
            **fields,
        }

    return {
        "models": [
            model("demo", source="demo", loaded=state == "ready"),
            model("other/large", source="hub"),
            model("strange", runs=False, reason="its type 'rwkv7' is not known.", smallest_bytes=None),
            model("other/huge", runs=False, reason="it needs at least 900MB.", smallest_bytes=900_000_000),
        ],
        **{"state": state, "loading": loading, "failure": "", "budget_bytes": 400_000_000, "idle_unload_s": None},
        "budgets": [{"bytes": 400_000_000, "text": "half of the experts"}],
    }


class Switching:
    """A server with several models, as a test has written it: the routes under /library, the events and /stats."""

    def __init__(self, page: Page, stats: dict[str, Any]) -> None:
        """stats: the answer of /stats while a model is loaded."""
        self.model = stats
        self.library = library("ready")
        self.refusal = ""
        self.asked: list[Any] = []
        page.route("**/library", lambda route: route.fulfill(json=self.library))
        page.route("**/library/load", self._load)
        page.route("**/stats", self._stats)
        page.route("**/events", self._events)

    def _load(self, route: Route) -> None:
        asked: Any = route.request.post_data_json
        self.asked.append(asked)
        if self.refusal:
            route.fulfill(status=400, json={"error": {"message": self.refusal}})
            return
        loading = {"name": asked["name"], "stage": "reading weights", "done": 45, "total": 100}
        self.library = library("loading", loading)
        route.fulfill(status=202, json=self.library)

    def _stats(self, route: Route) -> None:
        state = self.library["state"]
        about = {"loading": self.library["loading"], "loads": 1, "unloads": 0, "idle_unload_s": 900}
        rest = self.model if state == "ready" else {"model": None, "now": None}
        route.fulfill(json={**rest, "state": state, "library": about})

    def _events(self, route: Route) -> None:
        """The state as an event. The page asks again at once, since this stream ends."""
        loading = self.library["loading"] or {}
        data = json.dumps({"state": self.library["state"], "name": "", "stage": "", "done": 0, "total": 0, **loading})
        idle = 'event: state\ndata: {"state": "idle"}\n\n'
        route.fulfill(body=f"{idle}event: library\ndata: {data}\n\n", content_type="text/event-stream")
