"""MLX's arrays in NumPy: a failed read never becomes numbers, and no source file converts arrays in another way."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_tasks  # type: ignore[import-not-found]  # beside this file
import numpy as np
import pytest

from mlx_flash.flash.host_arrays import to_bytes, to_numpy

SOURCES = [
    path
    for folder in ("mlx_flash", "convert", "bench", "apps")  # mlx_flash/convert and similar names are links
    for path in sorted((Path(__file__).parent.parent / folder).rglob("*.py"))
]
CONVERTERS = {"array", "asarray", "asanyarray", "ascontiguousarray", "asfortranarray", "require", "copy"}
DISPLAYS = (ast.List, ast.Tuple, ast.ListComp, ast.Constant)
HOST_TYPES = ("np.ndarray", "npt.NDArray", "list", "memoryview")
HOST_CALLS = {"memoryview", "list", "sorted", "range"}


@pytest.fixture
def lost(tmp_path: Path) -> Callable[[mx.Dtype], mx.array]:
    """Makes an unevaluated array whose file is truncated, which is how MLX sees a failing disk."""

    def make(dtype: mx.Dtype) -> mx.array:
        path = tmp_path / f"{dtype}.safetensors"
        mx.save_safetensors(str(path), {"a": mx.ones((4096,)).astype(dtype)})
        arrays: Any = mx.load(str(path))
        os.truncate(path, 4096)
        return arrays["a"]  # type: ignore[no-any-return]

    return make


FORMS: dict[str, Callable[[mx.array], Any]] = {
    "itself": to_numpy,
    "a view": lambda array: to_numpy(array, copy=False),
    "another type": lambda array: to_numpy(array, np.float64),
    "widened": lambda array: to_numpy(array.astype(mx.float32)),
    "turned": lambda array: to_numpy(array.reshape(64, -1).T),
    "a sum": lambda array: to_numpy(array + 1),
    "bytes": to_bytes,
    # MLX's own conversions, which other code uses.
    "item": lambda array: array[3].item(),
    "a list": lambda array: array.tolist(),
    "a condition": lambda array: bool((array > 1).any()),
    "a buffer": lambda array: memoryview(array),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_what_cannot_be_read_is_an_error(lost: Callable[[mx.Dtype], mx.array], dtype: mx.Dtype, form: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=r"read|PEP 3118"):
        FORMS[form](lost(dtype))


@pytest.mark.parametrize(
    "array",
    [
        mx.array(3.5),
        mx.zeros((0, 3)),
        mx.arange(6).reshape(2, 3).T,
        mx.array([True, False]),
        mx.arange(5, dtype=mx.uint8),
        mx.ones((2, 2), mx.float16),
        mx.broadcast_to(mx.array([1, 2]), (3, 2)),
        mx.arange(64)[::3],
    ],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
@pytest.mark.parametrize("copy", [True, False])
def test_numbers_and_shapes_stay(array: mx.array, copy: bool) -> None:
    found = to_numpy(array, copy=copy)
    assert found.shape == array.shape
    assert found.tolist() == array.tolist()
    assert found.dtype.name == str(array.dtype).removeprefix("mlx.core.")
    assert to_bytes(array).tobytes() == found.tobytes()


def test_bfloat16_is_widened() -> None:
    array = mx.array([1.5, -2.0, 3e38]).astype(mx.bfloat16)
    assert to_numpy(array).dtype == np.float32
    assert to_numpy(array, copy=False).tolist() == array.astype(mx.float32).tolist()
    assert to_bytes(array).tobytes() == to_numpy(array.view(mx.uint16)).tobytes()


def test_a_copy_is_a_copy_and_a_view_a_view() -> None:
    array = mx.zeros((4,))
    copied, seen = to_numpy(array), to_numpy(array, copy=False)
    seen[:] = 7
    assert array.tolist() == [7.0] * 4
    assert copied.tolist() == [0.0] * 4


# -- the source files ----------------------------------------------------------------------------------------


def conversions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, code) of the calls that may evaluate an MLX array through NumPy.

    These are `np.array(x)` and similar calls, unless x is known to be on the host: a list, or a name that the
    function's signature declares as an `np.ndarray`, a `memoryview` or a list. All NumPy calls on an expression with
    `mx.` count.
    """
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Module)):
            continue
        annotated = {}
        if not isinstance(function, ast.Module):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            annotated = {a.arg: ast.unparse(a.annotation) for a in arguments if a.annotation is not None}
        for call in _own_calls(function):
            if not (isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) and call.args):
                continue
            if call.func.value.id != "np" or (call.func.attr not in CONVERTERS and not _speaks_of_mlx(call)):
                continue
            if call.func.attr in CONVERTERS and _is_hosts(call.args[0], annotated):
                continue
            yield call.lineno, ast.unparse(call)


def _own_calls(function: ast.AST) -> Iterator[ast.Call]:
    """Calls in a function's body, without those in nested functions."""
    waiting = list(ast.iter_child_nodes(function))
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.Call):
            yield node
        waiting.extend(ast.iter_child_nodes(node))


def _is_hosts(node: ast.expr, annotated: dict[str, str]) -> bool:
    if isinstance(node, DISPLAYS):
        return True
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        return name in HOST_CALLS or name.startswith("np.")
    while isinstance(node, (ast.Attribute, ast.Subscript)):  # x.T, x[1:]
        node = node.value
    return isinstance(node, ast.Name) and annotated.get(node.id, "").startswith(HOST_TYPES)


def _speaks_of_mlx(call: ast.Call) -> bool:
    """Whether an argument calls an MLX function outside of `to_numpy` and `tolist`, which evaluate safely."""
    waiting: list[ast.AST] = [*call.args, *(keyword.value for keyword in call.keywords)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in ("to_numpy", "to_bytes") or name.endswith((".tolist", ".item")):
                continue
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "mx":
            return True
        waiting.extend(ast.iter_child_nodes(node))
    return False


def test_no_source_file_converts_arrays_in_another_way() -> None:
    found = [
        f"{path}:{line}: {code}"
        for path in SOURCES
        if path.name != "host_arrays.py"
        for line, code in conversions(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, "use mlx_flash.flash.host_arrays.to_numpy:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("code", "is_found"),
    [
        ("np.array(logits)", True),
        ("np.array(model(mx.array([1]))[0])", True),
        ("np.asarray(a=1, *b)", True),
        ("def f(x: mx.array): return np.asarray(x, copy=False)", True),
        ("def f(x: Any): return np.ascontiguousarray(x.T)", True),
        ("np.isfinite(mx.abs(x)).all()", True),
        ("np.concatenate([part.astype(mx.float32) for part in parts])", True),
        ("np.array([1, 2], np.int32)", False),
        ("np.array([row.mean() for row in rows])", False),
        ("def f(x: np.ndarray): return np.ascontiguousarray(x[1:].T)", False),
        ("np.array(np.zeros(3))", False),
        ("np.packbits(to_numpy(mask + mx.array(1)))", False),
    ],
)
def test_the_search_finds(code: str, is_found: bool) -> None:
    assert bool(list(conversions(ast.parse(code)))) == is_found


@pytest.mark.skipif(mlx_tasks.COUNT is None, reason="this MLX keeps its count elsewhere")
def test_tasks_that_failed_are_not_counted_for_ever() -> None:
    """With two or more, a later evaluation may wait for ever. conftest.py repairs the count after each test."""
    assert mlx_tasks.COUNT is not None
    mlx_tasks.COUNT.value += 3
    assert mlx_tasks.set_right() == 3 and mlx_tasks.COUNT.value == 0
