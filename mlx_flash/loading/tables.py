"""Finds a model's lookup tables and the places of their rows in the files, and makes the model read the rows.

A table is a module that the model only calls with ids, for rows. No family is named here, and no class: a trial call of
the model shows how a module is used, and a small copy of the module shows what it does. No weight is read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..defaults import PREFILL_TOKENS
from ..flash.host_arrays import to_bytes
from ..flash.in_place import InPlaceFiles, TableTensor
from ..flash.safetensors_file import TensorEntry
from ..flash.table_rows import RowCache, TableRows, rows_per_sum
from ..layers.tables import StreamedTable
from .provenance import Provenance, is_as_loaded

LEAST_BYTES = 1 << 20  # A smaller table stays in memory, where a row costs no read.
CACHE_BYTES = 16 << 20  # of rows that are kept, of all tables together
COPIES = 3  # of a call's rows: as they are read, in order, and as the array that the zoo's module looks up
TRIAL_TOKENS = (8, 1)  # of the calls that show how tables are used: a prompt, and a token after it
TRIED_ROWS = 8  # of the small copy of a module


@dataclass(frozen=True)
class Table:
    """A lookup table whose rows can be read in place.

    holders: every module or list that has it, with its key there. ids_per_token: rows that a token asks for, 0 if the
    trial call asked only for rows of other tables beside it.
    """

    path: str
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

    def names(self) -> set[str]:
        """The paths of the table's parameters in the model."""
        return {f"{self.path}.{name}" for name in self.tensors}


# -- finding ---------------------------------------------------------------------------------------------------------


def find_tables(model: Any, provenance: Provenance, entries: Mapping[str, tuple[int, TensorEntry]]) -> list[Table]:
    """The tables of a model whose rows lie in the files as the model computes with them, and that are worth it.

    model: as it was lazily loaded. provenance: the checkpoint's tensors behind its parameters. entries: name in the
    checkpoint -> (index of the file, entry in its header).
    """
    tables = []
    for found in _looked_up(model):
        module = found.module
        arrays = _arrays(module)
        if sum(array.nbytes for array in arrays.values()) < LEAST_BYTES:
            continue
        places = {name: _place(f"{found.path}.{name}", array, provenance, entries) for name, array in arrays.items()}
        whole = {name: place for name, place in places.items() if place is not None}
        if len(whole) == len(places):
            tables.append(Table(found.path, found.holders, whole, found.ids_per_token))
    return tables


def _place(
    key: str, array: mx.array, provenance: Provenance, entries: Mapping[str, tuple[int, TensorEntry]]
) -> TableTensor | None:
    """The place of a table's array (R, ...); None if it is not one of the checkpoint's tensors, as it lies there."""
    names = provenance.sources.get(key, [])
    changed = provenance.arrays.get(key) is not array or not is_as_loaded(array)
    if changed or key in provenance.stacked or len(names) != 1 or names[0] not in entries:
        return None
    number, entry = entries[names[0]]
    if entry.end - entry.begin != array.nbytes:
        return None
    return TableTensor(number, entry.begin, array.shape[0], tuple(array.shape[1:]), array.dtype)


@dataclass
class _Found:
    """A module that looks up rows, and how a trial call used it."""

    path: str
    module: nn.Module
    holders: list[tuple[Any, Any]]
    calls: int = 0
    ids_per_token: int = 0
    used_otherwise: bool = False


def _looked_up(model: Any) -> list[_Found]:
    """The modules that the model uses for nothing but looking up rows."""
    found: dict[int, _Found] = {}
    for path, holder, key, module in _modules(model):
        if id(module) in found:
            found[id(module)].holders.append((holder, key))
        elif _looks_up_rows(module):
            found[id(module)] = _Found(path, module, [(holder, key)])
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
        return np.array_equal(*map(to_bytes, results))
    except Exception:  # It does not take ids, or not ids alone.
        return False


class _Watched:
    """Takes the place of a module that looks up rows, and notes how it is used."""

    def __init__(self, found: _Found, tokens: int) -> None:
        self._found, self._tokens = found, tokens
        self._small = copy.copy(found.module)
        for name, array in _arrays(found.module).items():
            self._small[name] = mx.zeros((1, *array.shape[1:]), array.dtype)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        found = self._found
        if len(arguments) != 1 or options or not _are_ids(arguments[0]):
            found.used_otherwise = True
            return found.module(*arguments, **options)
        found.calls += 1
        found.ids_per_token = max(found.ids_per_token, -(-arguments[0].size // self._tokens))
        return self._small(mx.zeros_like(arguments[0]))

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


# -- planning --------------------------------------------------------------------------------------------------------


def work_bytes(tables: Sequence[Table]) -> int:
    """The memory that looking up a chunk of a prompt takes in all tables, if they are streamed."""
    per_token = sum(table.ids_per_token * sum(table.row_bytes.values()) for table in tables)
    return COPIES * PREFILL_TOKENS * per_token


def cache_bytes(tables: Sequence[Table]) -> int:
    """The memory of the rows that are kept, if these tables are streamed."""
    return min(CACHE_BYTES, sum(table.nbytes for table in tables))


# -- streaming -------------------------------------------------------------------------------------------------------


def stream_tables(tables: Sequence[Table], shared: InPlaceFiles, kept_bytes: int, compared: bool) -> list[RowCache]:
    """Makes the model read the rows of tables when it looks them up.

    kept_bytes: memory for rows that are kept. It is divided so that each kind of row is kept for as many tokens.
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
        cache = RowCache(dict(kind), min(rows, need * kept_bytes // per_token))
        caches.append(cache)
        first_key = 0
        for table in alike:
            group_rows = rows_per_sum(table.tensors) if compared else 1
            streamed = TableRows(shared, table.path, table.tensors, cache, first_key, group_rows)
            first_key += table.rows
            inner = table.holders[0][0][table.holders[0][1]]
            module = StreamedTable(inner, streamed)
            for holder, key in table.holders:
                holder[key] = module
    return caches
