"""The server's own page and its guard, with answers that a test has written: no model, no engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from mlx_flash.server.access import Access
from mlx_flash.server.app import PAGE
from mlx_flash.server.guard import Guard
from mlx_flash.server.serving import HttpThread, bind, url_of

POLL_S = 0.005
STATS = {
    "model": {
        **{"id": "scripted", "path": "", "sampling": {}, "images": False},
        **{"kind": "experts", "layers": 4, "unit_size": 1, "units_per_layer": 64},
    },
    "plan": {"context": 8192},
    "memory": {"budget_bytes": 8e9, "current_bytes": 2e9},
    "resident": {"units": [40, 36, 44, 38], "share": 0.617},
    "last": None,
    "now": None,
}

LONG_ANSWER = r"""# Sorting in three ways

Sorting puts a list into order. **Three** ways are common, and they differ in *time* and in
`memory`; see [the overview](https://en.wikipedia.org/wiki/Sorting_algorithm) or https://example.org/sorting.

## The ways

1. **Insertion sort** takes each element and puts it where it belongs.
   - It is quick for short lists.
   - It needs no more memory.
2. **Merge sort** splits the list, sorts both halves, and merges them:

   ```python
   def merge_sort(values: list[int]) -> list[int]:
       '''Returns the values in order.'''
       if len(values) < 2:
           return values
       middle = len(values) // 2
       left, right = merge_sort(values[:middle]), merge_sort(values[middle:])
       return merge(left, right)  # linear in len(values), and a comment that is long enough to scroll sideways
   ```
3. **Quicksort** partitions.

| algorithm | best | average | worst | memory | stable |
|:--|--:|--:|--:|--:|:-:|
| insertion sort | $n$ | $n^2$ | $n^2$ | 1 | yes |
| merge sort | $n \log n$ | $n \log n$ | $n \log n$ | $n$ | yes |
| quicksort | $n \log n$ | $n \log n$ | $n^2$ | $\log n$ | no |

The recurrence $T(n) = 2\,T(n/2) + n$ gives, by the master theorem,

$$
T(n) = n \log_2 n + O(n), \qquad \sum_{k=0}^{\log_2 n} 2^k \cdot \frac{n}{2^k} = n\,(\log_2 n + 1)
$$

and for quicksort's average:

\[
\begin{aligned}
C(n) &= n - 1 + \frac{2}{n} \sum_{i=0}^{n-1} C(i) \\
     &\approx 2 n \ln n
\end{aligned}
\]

> A stable sort keeps the order of equal elements.
>
> It matters when one sorts by two keys.

It costs $5 and $10, not more. A shell command:

```bash
sort -n -k 2 numbers.txt | uniq -c > counts.txt   # and so on
```

---

```json
{"name": "merge", "stable": true, "seconds": [0.5, 1.25, null]}
```

### Which one?

For lists of fewer than 32 elements, insertion sort; else merge sort, *unless* memory is short.
"""


def text(words: str, size: int = 1 << 20) -> list[dict[str, Any]]:
    """The deltas of a text, of so many characters each."""
    return [{"content": words[at : at + size]} for at in range(0, len(words), size)]


def thought(words: str, size: int = 1 << 20) -> list[dict[str, Any]]:
    return [{"reasoning_content": words[at : at + size]} for at in range(0, len(words), size)]


def call(index: int, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"tool_calls": [{"index": index, "id": f"call_{index}", "type": "function", "function": function}]}


class ScriptedPage:
    """url: where the page is. script: the deltas of the next answers. asked: the bodies of the requests for them.

    `hold` stops answers after so many deltas; None: they do not stop. pause_s: the time between two deltas.
    """

    def __init__(self) -> None:
        self.url = ""
        self.script: list[dict[str, Any]] = []
        self.asked: list[dict[str, Any]] = []
        self.hold: int | None = None
        self.pause_s = 0.0
        self.closed = False

    async def answer(self, request: Request) -> StreamingResponse:
        self.asked.append(await request.json())
        return StreamingResponse(self._chunks(list(self.script)), media_type="text/event-stream")

    async def _chunks(self, script: list[dict[str, Any]]) -> AsyncIterator[str]:
        for number, delta in enumerate([*script, None]):
            while self.hold is not None and number >= self.hold and not self.closed:
                await asyncio.sleep(POLL_S)
            choice = {"index": 0, "delta": delta or {}, "finish_reason": None if delta else "stop"}
            chunk: dict[str, Any] = {"id": "chatcmpl-1", "choices": [choice]}
            if delta is None:
                chunk["usage"] = {"completion_tokens": len(script), "total_tokens": len(script) + 9}
            yield f"data: {json.dumps(chunk)}\n\n"
            if self.pause_s:
                await asyncio.sleep(self.pause_s)
        yield "data: [DONE]\n\n"

    async def events(self, _: Request) -> StreamingResponse:
        async def lines() -> AsyncIterator[str]:
            yield 'event: state\ndata: {"state": "idle"}\n\n'
            while not self.closed:
                await asyncio.sleep(POLL_S)

        return StreamingResponse(lines(), media_type="text/event-stream")

    def app(self) -> Guard:
        routes = [
            Route("/", lambda _: FileResponse(PAGE / "index.html")),
            Route("/health", lambda _: JSONResponse({"status": "ok"})),
            Route("/stats", lambda _: JSONResponse(STATS)),
            Route("/events", self.events),
            Route("/v1/chat/completions", self.answer, methods=["POST"]),
            Mount("/page", StaticFiles(directory=PAGE)),
        ]
        return Guard(Starlette(routes=routes), Access())


@contextmanager
def scripted_page() -> Iterator[ScriptedPage]:
    script, bound = ScriptedPage(), bind("127.0.0.1", 0)
    script.url = url_of(bound)
    with HttpThread(script.app(), bound):
        try:
            yield script
        finally:
            script.closed = True
