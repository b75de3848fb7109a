"""How often each unit of a model was used lately, kept in the cache folder for the next start: a file for each model.

A file has one number for every unit: how often tokens used it, where each further token counts a little less. It has
no texts and no tokens, nor the order in which units were used.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .cached import USES
from .model_notes import note_path, state_of
from .ssd_writes import write_small

SUFFIX = ".uses"
MOST_UNITS = 4 << 20  # of a model whose uses are kept; two bytes each
MOST_HEADER = 64 << 10  # bytes
MOST_FILES = 32  # those that were written last stay

Uses = list[npt.NDArray[np.float16]]
"""For each layer, the uses of its units, (units,) >= 0."""


class KeptUses:
    """The kept uses of one model.

    folder: the model's. files: those that units are read from. unit: the name of a unit. counts: the number of units of
    each layer.
    """

    def __init__(self, folder: Path, files: Sequence[Path], unit: str, counts: Sequence[int]) -> None:
        self._folder, self._files, self._unit, self._counts = folder.resolve(), list(files), unit, list(counts)

    def read(self) -> Uses | None:
        """The uses; None if none are kept, or only those of other files."""
        with contextlib.suppress(OSError, UsageError, ValueError, TypeError, RecursionError):
            path, nbytes = self._path(), sum(self._counts) * np.dtype(np.float16).itemsize
            if not path.is_file() or not nbytes < path.stat().st_size <= nbytes + MOST_HEADER:
                return None
            head, _, body = path.read_bytes().partition(b"\n")
            about = json.loads(head)
            if about != {**self._about(), "crc32": zlib.crc32(body)} or len(body) != nbytes:
                return None
            whole = np.frombuffer(body, np.float16)
            if not np.isfinite(whole).all() or (whole < 0).any():
                return None
            return [part.copy() for part in np.split(whole, np.cumsum(self._counts)[:-1])]
        return None

    def write(self, uses: Uses) -> None:
        """Keeps the uses. Does nothing for too many units, or if the folder cannot be written to."""
        if sum(self._counts) > MOST_UNITS:
            return
        with contextlib.suppress(OSError, UsageError, ValueError):
            path, body = self._path(), b"".join(each.tobytes() for each in uses)
            head = json.dumps({**self._about(), "crc32": zlib.crc32(body)})
            write_small(path, head.encode() + b"\n" + body)
            kept = sorted(path.parent.glob(f"*{SUFFIX}"), key=lambda each: each.stat().st_mtime)
            for old in kept[:-MOST_FILES]:
                old.unlink(missing_ok=True)

    def _path(self) -> Path:
        return note_path(USES, self._folder, SUFFIX)

    def _about(self) -> dict[str, Any]:
        """What the uses belong to. Raises OSError."""
        return {
            "model": str(self._folder),
            "files": state_of(self._files),
            "unit": self._unit,
            "counts": self._counts,
        }
