"""The output items of recent responses, for requests that name an item by its id in place of sending it."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

MOST_ITEMS = 1000
MOST_ITEM_BYTES = 4 << 20  # all items together, as JSON


class RecentItems:
    """Items by id, within two limits; the least recently used go first. Belongs to the event loop."""

    def __init__(self, most_items: int = MOST_ITEMS, most_bytes: int = MOST_ITEM_BYTES) -> None:
        self.most_items, self.most_bytes = most_items, most_bytes
        self.held_bytes = 0
        self._items: OrderedDict[str, bytes] = OrderedDict()  # id -> JSON; the least recently used first

    def __len__(self) -> int:
        return len(self._items)

    def keep(self, items: Iterable[dict[str, Any]]) -> None:
        for item in items:
            held = json.dumps(item, separators=(",", ":")).encode()
            self._drop(item["id"])
            if len(held) > self.most_bytes:  # It would push out all others, and still be too large.
                continue
            self._items[item["id"]] = held
            self.held_bytes += len(held)
            while len(self._items) > self.most_items or self.held_bytes > self.most_bytes:
                self._drop(next(iter(self._items)))

    def find(self, id: str) -> dict[str, Any] | None:
        if id not in self._items:
            return None
        self._items.move_to_end(id)
        return json.loads(self._items[id])  # type: ignore[no-any-return]

    def _drop(self, id: str) -> None:
        self.held_bytes -= len(self._items.pop(id, b""))
