"""A context in a file. Its tokens and places are in memory, its arrays are read when a prompt continues it.

Nothing in a file names code, and no size in it is believed: the arrays are read into the parts of a new cache of the
same model. context_file.py describes the file.
"""

from __future__ import annotations

import copy
import hashlib
import json
import zlib
from collections.abc import Iterable
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from ..defaults import KV_STEP_TOKENS
from ..flash.files import round_up
from ..flash.host_arrays import to_numpy
from ..flash.safetensors_file import entries_of, header_bytes
from ..flash.stored_tensors import SAFETENSORS_NAMES
from ..layers.cache_parts import parts_of
from .cached_context import CachedContext, Snapshot, grows
from .context_file import FORMAT, HEADER_SUM, MOST_HEADER_BYTES, PIECE_BYTES, TOKENS

DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
MALFORMED = "its description is malformed"


class WrittenContext(CachedContext):
    """What a file's header says of a context.

    tokens: int32 (n,). name, nbytes: of the file. trims: whether all parts could be trimmed.
    """

    def __init__(self, name: str, file: BinaryIO) -> None:
        """Reads and compares all but the arrays. Raises ValueError if the file cannot be trusted, and OSError."""
        header = header_bytes(file, MOST_HEADER_BYTES)
        self.name, self.file_bytes = name, file.seek(0, 2)
        file.seek(max(0, self.file_bytes - 32))
        if file.read(32) != hashlib.sha256(header).digest():
            raise ValueError("its header does not match its checksum")
        self._entries = entries_of(header, self.file_bytes)
        try:
            known = json.loads(header[8:])["__metadata__"]
            about, digits = json.loads(known["about"]), known["sums"]
            names = list(self._entries)
            if known["format"] != FORMAT or names[0] != TOKENS or names[-1] != HEADER_SUM:
                raise ValueError("it has another format")
            self._sums = {each: int(digits[8 * at : 8 * at + 8], 16) for at, each in enumerate(names[:-1])}
            super().__init__([], about["step"])
            self.stops, self.ends, self.as_read = about["stops"], about["ends"], about["as_read"]
            self.decoded, self.trims = about["decoded"], about["trims"]
            self._parts, self._snapshots = about["parts"], {int(at): each for at, each in about["snapshots"].items()}
            self.snapshots = dict.fromkeys(self._snapshots)  # type: ignore[assignment]  # their places are enough here
            tokens = np.zeros(self._entries[TOKENS].shape, np.int32)
            self._read(file, TOKENS, [tokens])
            places = [self.step, self.as_read, *self.stops, *self.ends, *self.snapshots]
        except (LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"{MALFORMED} ({type(error).__name__})") from None
        self.tokens: Any = tokens
        sound = all(type(place) is int and 0 <= place <= len(tokens) for place in places[1:])
        if not sound or type(self.step) is not int or self.step < 1 or tokens.ndim != 1 or not len(tokens):
            raise ValueError(MALFORMED)

    def common(self, prompt: list[int]) -> int:
        size = min(len(self.tokens), len(prompt))
        other = np.flatnonzero(self.tokens[:size] != np.asarray(prompt[:size], np.int64))
        return int(other[0]) if len(other) else size

    def can_cut(self, place: int) -> bool:
        return self.trims is True or place in self.snapshots or place == len(self.tokens)

    @property
    def part_bytes(self) -> int:
        """Bytes of the arrays without snapshots, and without the steps that hold no token."""
        return self._bytes_of(self._parts)

    def needed_snapshot(self, place: int) -> int | None:
        """The snapshot that a cut to `place` restores; None if it needs none."""
        return place if place < len(self.tokens) and place in self.snapshots else None

    def read_into(
        self, cache: list[Any], file: BinaryIO, place: int, tokens: int, snapshot_bytes: int
    ) -> CachedContext:
        """The context's first `place` tokens. Each array is read straight into its place.

        cache: a new one of the model, which is filled. tokens: how many the context will hold at least. snapshot_bytes:
        memory for snapshots; those that do not fit are left out. Raises ValueError if the file cannot be trusted.
        """
        whole, parts = len(self.tokens), parts_of(cache)
        at = self.needed_snapshot(place)
        try:
            saved = [None] * len(self._parts) if at is None else self._snapshots[at]
            if not len(self._parts) == len(saved) == len(parts):
                raise ValueError("it has another number of parts")
            for part, spec, restored in zip(parts, self._parts, saved, strict=True):
                if restored is not None:
                    self._fill(file, part, restored, 0)
                    continue
                self._fill(file, part, spec, max(tokens, whole))
                if grows(part) and part.offset != whole:
                    raise ValueError("a part holds another number of tokens")
                if place < whole:
                    part.trim(whole - place)
            made = CachedContext(cache, self.step, self.tokens.tolist(), list(self.stops), list(self.ends))
            made.as_read, made.decoded = self.as_read, self.decoded
            made.forget_after(place)
            for each in sorted(self._snapshots):
                nbytes = self._bytes_of(self._snapshots[each])
                if each <= place and nbytes <= snapshot_bytes:
                    made.snapshots[each] = self._snapshot(file, self._snapshots[each], parts, nbytes)
                    snapshot_bytes -= nbytes
        except (LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise ValueError(f"{MALFORMED} ({type(error).__name__})") from None
        return made

    def _snapshot(self, file: BinaryIO, specs: list[Any], parts: list[Any], nbytes: int) -> Snapshot:
        copies: list[Any] = []
        for part, spec in zip(parts, specs, strict=True):
            copies.append(None if spec is None else copy.copy(part))
            if spec is not None:
                self._fill(file, copies[-1], spec, 0)
        return Snapshot(tuple(copies), nbytes)

    def _fill(self, file: BinaryIO, part: Any, spec: dict[str, Any], tokens: int) -> None:
        """Gives a part's attributes the values in the file. tokens: that its growing arrays get memory for."""
        if spec.keys() != vars(part).keys():
            raise ValueError(f"a {type(part).__name__} has other attributes")
        for name, value in spec.items():
            vars(part)[name] = self._restored(file, value, tokens)

    def _restored(self, file: BinaryIO, value: dict[str, Any], tokens: int) -> Any:
        if "array" in value:
            return self._array(file, f"t{value['array']}", tokens if value["grows"] else 0)
        ((kind, inner),) = value.items()
        if kind in ("list", "tuple"):
            items = [self._restored(file, item, tokens) for item in inner]
            return items if kind == "list" else tuple(items)
        if kind != "value" or (inner is not None and type(inner) not in (bool, int, float, str)):
            raise ValueError(MALFORMED)
        return inner

    def _array(self, file: BinaryIO, name: str, tokens: int) -> mx.array:
        """The array of a tensor, in memory of its own. tokens: if not 0, it gets whole steps for so many."""
        entry = self._entries[name]
        dtype, shape = DTYPES[entry.dtype], list(entry.shape)
        if tokens:
            if shape[-2] != len(self.tokens):
                raise ValueError("an array holds another number of tokens")
            shape[-2] = round_up(tokens, KV_STEP_TOKENS)
        held = mx.zeros(shape, UNSIGNED[dtype.size])
        mx.eval(held)
        if held.size:
            seen = to_numpy(held, copy=False)
            self._read(file, name, _rows(seen[..., : len(self.tokens), :] if tokens else seen))
            del seen  # MLX may give the memory to a result only when nothing else refers to it
        array = held.view(dtype)
        mx.eval(array)
        return array

    def _read(self, file: BinaryIO, name: str, targets: Iterable[np.ndarray]) -> None:
        """Reads a tensor into contiguous pieces of memory and compares it. Raises ValueError and OSError."""
        entry, crc = self._entries[name], 0
        file.seek(entry.begin)
        left = entry.end - entry.begin
        for target in targets:
            view = memoryview(target.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # np.ndarray is a buffer
            left -= len(view)
            while view:
                if not (count := file.readinto(view[:PIECE_BYTES])):  # type: ignore[attr-defined]
                    raise ValueError("it was cut short")
                crc = zlib.crc32(view[:count], crc)
                view = view[count:]
        if left or crc != self._sums[name]:
            raise ValueError("an array does not match its checksum")

    def _bytes_of(self, value: Any) -> int:
        """Bytes of the arrays that are named in a part of the description. Raises ValueError."""
        if isinstance(value, dict) and "array" in value:
            if (entry := self._entries.get(f"t{value['array']}")) is None:
                raise ValueError(MALFORMED)
            return entry.end - entry.begin
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return sum(self._bytes_of(each) for each in inner)


def _rows(seen: np.ndarray) -> Iterable[np.ndarray]:
    """The contiguous pieces of an array, in order."""
    if seen.flags.c_contiguous:
        yield seen
    else:
        for each in seen:
            yield from _rows(each)
