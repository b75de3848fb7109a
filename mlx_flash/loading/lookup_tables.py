"""Finds a model's lookup tables and the places of their rows in the files, and makes the model read the rows.

A table is a module that the model only calls with ids, for rows. No family is named here, and no class: a trial call of
the model shows how a module is used, and a small copy of the module shows what it does. No weight is read.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..defaults import PREFILL_TOKENS
from ..flash.host_arrays import to_bytes
from ..flash.in_place import InPlaceFiles, TableTensor
from ..flash.table_rows import RowCache, TableRows, rows_per_sum
from ..layers.streamed_table import StreamedTable
from .lazy_model import LazyModel
from .memory_needs import OneRow
from .provenance import is_as_loaded

LEAST_BYTES = 1 << 20  # A smaller table stays in memory, where a row costs no read.
KEPT_BYTES = 16 << 20  # of rows that are kept at least, of all tables together, but no more than a share of them
KEPT_SHARE = 0.125
COPIES = 3  # of a call's rows: as they are read, in order, and as the array that the zoo's module looks up
WORTH = 2  # A table is at least this many times as large as these copies are for a chunk of a prompt.
TRIAL_TOKENS = (8, 1)  # of the calls that show how tables are used: a prompt, and a token after it
TRIED_ROWS = 8  # of the small copy of a module


@dataclass(frozen=True)
class Table:
    """A lookup table whose rows can be read in place.

    paths: its paths in the model. holders: the module or list that has it, with its key there, for each path.
    ids_per_token: rows that a token asks for, 0 if the
    trial call asked only for rows of other tables beside it.
    """

    paths: Sequence[str]
    holders: Sequence[tuple[Any, Any]]
    tensors: Mapping[str, TableTensor]
    ids_per_token: int

    @property
    def rows(self) -> int:
        return next(iter(self.tensors.values())).rows

    @property
    def row_bytes(self) -> dict[str, int]:
        """For each tensor, by name, the bytes of its part of a row."""
        return {name: tensor.nbytes for name, tensor in sorted(self.tensors.items())}

    @property
    def nbytes(self) -> int:
        return self.rows * sum(self.row_bytes.values())

    @property
    def work_bytes(self) -> int:
        """The memory that looking up a chunk of a prompt takes, if the rows are read."""
        return COPIES * PREFILL_TOKENS * self.ids_per_token * sum(self.row_bytes.values())

    @property
    def stand_ins(self) -> list[tuple[Any, Any, OneRow]]:
        """What takes its place in a trial call, in the form of `needs_of`."""
        stand_in = OneRow(self.holders[0][0][self.holders[0][1]])
        return [(holder, key, stand_in) for holder, key in self.holders]

    def names(self) -> set[str]:
        """The paths of the table's parameters in the model."""
        return {f"{path}.{name}" for path in self.paths for name in self.tensors}


# -- finding ---------------------------------------------------------------------------------------------------------


def find_tables(lazy: LazyModel) -> list[Table]:
    """The tables of a model whose rows lie in the files as the model computes with them, and that are worth it."""
    tables = []
    uses = Counter(source for names in lazy.provenance.sources.values() for source in names)
    for found in _looked_up(lazy.model):
        places: dict[str, TableTensor] = {}
        arrays = _arrays(found.module)
        for name, array in arrays.items():
            for path in found.paths:
                sources = lazy.provenance.sources.get(key := f"{path}.{name}", [])
                alone = all(uses[source] <= len(found.paths) for source in sources)  # or another module keeps them
                if alone and (place := _place(key, array, lazy)) is not None:
                    places[name] = place
        table = Table(found.paths, found.holders, places, found.ids_per_token)
        if len(places) == len(arrays) and table.nbytes >= max(LEAST_BYTES, WORTH * table.work_bytes):
            tables.append(table)
    return tables


def _place(key: str, array: mx.array, lazy: LazyModel) -> TableTensor | None:
    """The place of a table's array (R, ...); None if its rows do not follow each other in one tensor of a file.

    Nothing here is in proportion to the rows, unlike in `locate`.
    """
    followed = lazy.provenance.followed.get(key)
    if followed is None or lazy.provenance.arrays.get(key) is not array:
        return None
    if not is_as_loaded(array, followed.primitives):
        return None
    piece, view = followed.pieces[0], followed.pieces[0].view
    alike = view.shape == tuple(array.shape) and view.itemsize == array.dtype.size and view.flags.c_contiguous
    if len(followed.pieces) != 1 or piece.source not in lazy.entries or not alike:
        return None
    number, entry = lazy.entries[piece.source]
    if not 0 <= piece.offset <= entry.end - entry.begin - array.nbytes:
        return None
    return TableTensor(number, entry.begin + piece.offset, array.shape[0], tuple(array.shape[1:]), array.dtype)


@dataclass
class _Found:
    """A module that looks up rows, and how a trial call used it."""

    module: nn.Module
    paths: list[str]
    holders: list[tuple[Any, Any]]
    calls: int = 0
    ids_per_token: int = 0
    used_otherwise: bool = False


def _looked_up(model: Any) -> list[_Found]:
    """The modules that the model uses for nothing but looking up rows."""
    found: dict[int, _Found] = {}
    for path, holder, key, module in _modules(model):
        if id(module) in found:
            found[id(module)].paths.append(path)
            found[id(module)].holders.append((holder, key))
        elif _looks_up_rows(module):
            found[id(module)] = _Found(module, [path], [(holder, key)])
    if not found:
        return []
    candidates = list(found.values())
    try:
        _try_out(model, candidates)
    except Exception:  # The model cannot be run like this. If it cannot be run at all, the plan reports it.
        return []
    # A table in pieces is called only for the pieces that the trial's ids lie in.
    called = {id(holder) for each in candidates if each.calls for holder, _ in each.holders if isinstance(holder, list)}
    return [
        each
        for each in candidates
        if not each.used_otherwise and (each.calls or any(id(holder) in called for holder, _ in each.holders))
    ]


def _modules(model: Any) -> Iterator[tuple[str, Any, Any, nn.Module]]:
    """(path, holder, key, module) of every module below `model`; several times for a module with several holders."""

    def below(holder: Any, path: str) -> Iterator[tuple[str, Any, Any, nn.Module]]:
        items = enumerate(holder) if isinstance(holder, list) else list(holder.items())
        for key, value in items:
            where = f"{path}.{key}" if path else str(key)
            if isinstance(value, nn.Module):
                yield where, holder, key, value
            if isinstance(value, (list, dict)):
                yield from below(value, where)

    yield from below(model, "")


def _arrays(module: nn.Module) -> dict[str, mx.array]:
    return {name: value for name, value in module.items() if isinstance(value, mx.array)}


def _looks_up_rows(module: nn.Module) -> bool:
    """Whether a module returns, for ids, rows of its arrays or what it makes of each row by itself.

    A copy with a few random rows is asked for them, and a second one that has them in another order, for the same rows.
    """
    arrays = _arrays(module)
    shapes = [array.shape for array in arrays.values()]
    if not shapes or any(len(shape) < 2 or shape[0] != shapes[0][0] for shape in shapes) or not shapes[0][0]:
        return False
    if module.children():
        return False
    ids = np.random.default_rng(2).permutation(TRIED_ROWS).reshape(2, -1)
    order, random = np.random.default_rng(0).permutation(TRIED_ROWS), np.random.default_rng(1)
    small, reordered = copy.copy(module), copy.copy(module)
    try:
        for name, array in arrays.items():
            small[name] = mx.zeros((TRIED_ROWS, *array.shape[1:]), array.dtype)
        result = small(mx.array(ids))  # not evaluated
        if not isinstance(result, mx.array) or result.shape[:-1] != ids.shape:
            return False
        for name, array in arrays.items():
            rows = random.integers(0, 256, (TRIED_ROWS, array[0].nbytes), np.uint8)
            for each, contents in ((small, rows), (reordered, rows[order])):
                each[name] = mx.array(contents).view(array.dtype).reshape(TRIED_ROWS, *array.shape[1:])
        results = small(mx.array(ids)), reordered(mx.array(np.argsort(order)[ids]))
        return np.array_equal(to_bytes(results[0]), to_bytes(results[1]))
    except Exception:  # It does not take ids, or not ids alone.
        return False


class _Watched:
    """Takes the place of a module that looks up rows, and notes how it is used."""

    def __init__(self, found: _Found, tokens: int) -> None:
        self._found, self._tokens, self._stand_in = found, tokens, OneRow(found.module)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        found = self._found
        if len(arguments) != 1 or options or not _are_ids(arguments[0]):
            found.used_otherwise = True
            return found.module(*arguments, **options)
        found.calls += 1
        found.ids_per_token = max(found.ids_per_token, -(-arguments[0].size // self._tokens))
        return self._stand_in(arguments[0])

    def __getattr__(self, name: str) -> Any:
        self._found.used_otherwise = True
        return getattr(self._found.module, name)

    def __getitem__(self, name: str) -> Any:
        self._found.used_otherwise = True
        return self._found.module[name]

    def __contains__(self, name: str) -> bool:
        self._found.used_otherwise = True
        return name in self._found.module


def _are_ids(argument: Any) -> bool:
    return isinstance(argument, mx.array) and mx.issubdtype(argument.dtype, mx.integer)


def _try_out(model: Any, candidates: Sequence[_Found]) -> None:
    """Calls the model while its candidates are watched. Nothing is evaluated, unless the model's own code does so."""
    from mlx_lm.models.cache import make_prompt_cache

    try:
        cache = make_prompt_cache(model)
        for tokens in TRIAL_TOKENS:
            for each in candidates:
                watched = _Watched(each, tokens)
                for holder, key in each.holders:
                    holder[key] = watched
            model(mx.zeros((1, tokens), mx.int32), cache=cache)
    finally:
        for each in candidates:
            for holder, key in each.holders:
                holder[key] = each.module


# -- reading ---------------------------------------------------------------------------------------------------------


def kept_bytes(tables: Sequence[Table]) -> int:
    """The memory of the rows that are kept at least, if the rows of these tables are read."""
    return min(KEPT_BYTES, int(KEPT_SHARE * sum(table.nbytes for table in tables)))


def stream_tables(tables: Sequence[Table], shared: InPlaceFiles, kept: int, compared: bool) -> list[RowCache]:
    """Makes the model read the rows of tables when it looks them up.

    kept: bytes of memory for rows that are kept. Each kind of row gets a share with room for as many tokens.
    compared: whether reads are compared with checksums, which were made of `summed_segments`.
    Returns the caches of the rows, one for each kind of row.
    """
    kinds: dict[tuple[tuple[str, int], ...], list[Table]] = {}
    for table in tables:
        kinds.setdefault(tuple(table.row_bytes.items()), []).append(table)
    caches = []
    needs = [max(1, sum(table.ids_per_token for table in alike)) for alike in kinds.values()]
    per_token = sum(need * RowCache.slot_bytes(dict(kind)) for kind, need in zip(kinds, needs, strict=True))
    for (kind, alike), need in zip(kinds.items(), needs, strict=True):
        rows = sum(table.rows for table in alike)
        cache = RowCache(dict(kind), min(rows, need * kept // per_token))
        caches.append(cache)
        first_key = 0
        for table in alike:
            group_rows = rows_per_sum(table.tensors) if compared else 1
            streamed = TableRows(shared, table.paths[0], table.tensors, cache, first_key, group_rows)
            first_key += table.rows
            inner = table.holders[0][0][table.holders[0][1]]
            module = StreamedTable(inner, streamed)
            for holder, key in table.holders:
                holder[key] = module
    return caches
