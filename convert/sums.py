"""Checksums of the bytes written into the partial folder, made in memory and kept until the store is complete.

Everything that is read back from the folder, in the same run or in a later one, is compared with them. The store's
manifest gets these checksums, never ones of bytes that were read back: those of a faulty disk would confirm its errors.
"""

from __future__ import annotations

import json
from pathlib import Path

from mlx_flash.flash.plain_files import reading
from mlx_flash.flash.system import sync_to_disk

SUMS = "checksums.jsonl"  # a work file in the partial folder


class WrittenSums:
    """A log of checksums: file -> tensor -> CRC-32. Each file has one line of JSON: {"file": ..., "crc32": {...}}.

    A line is on the disk before its file is renamed to its final name. If a file has two lines, the later one counts.
    An incomplete last line, as a kill may leave, is ignored. Raises ReadError if the log exists and cannot be read.
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
