"""What was meant to be written into the partial folder: checksums of bytes in memory, kept until the store is whole.

What is read back from there, in the same run or in a later one, is compared with them; and a store's manifest has
these, never ones that were made of what was read back: a disk that returns something else must not be blessed.
"""

from __future__ import annotations

import json
from pathlib import Path

from mlx_flash.flash.plain_files import reading
from mlx_flash.flash.system import sync_to_disk

SUMS = "checksums.jsonl"  # a work file in the partial folder


class WrittenSums:
    """CRC-32 by name of a file and of a tensor in it. One line of JSON for each file: {"file": ..., "crc32": {...}}.

    A line is on the disk before its file has its name; of two lines for one file the later one counts. What a kill
    left of a last line is nothing. Raises ReadError if there is a log that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / SUMS
        self._sums: dict[str, dict[str, int]] = {}
        lines = []
        if self._path.exists():
            with reading(self._path):
                text = self._path.read_bytes()
            lines = text.split(b"\n")
            if lines[-1]:
                with self._path.open("ab") as file:
                    file.write(b"\n")
        for line in lines:
            try:
                entry = json.loads(line)
                self._sums[str(entry["file"])] = {str(name): int(crc) for name, crc in entry["crc32"].items()}
            except (ValueError, KeyError, TypeError, AttributeError):
                continue

    def add(self, name: str, sums: dict[str, int]) -> None:
        with self._path.open("ab") as file:
            file.write(json.dumps({"file": name, "crc32": sums}, separators=(",", ":")).encode() + b"\n")
            file.flush()
            sync_to_disk(file.fileno())
        self._sums[name] = sums

    def of(self, name: str) -> dict[str, int] | None:
        return self._sums.get(name)
