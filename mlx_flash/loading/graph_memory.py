"""Computes from a graph alone how much memory MLX takes to evaluate it.

The arrays of a graph are made and dropped as in MLX 0.32:

- `eval` takes them in an order that transforms.cpp fixes: breadth first from the end, at most 20 wide, backwards.
- A view has no memory of its own. An elementwise operation takes over the memory of an operand that nothing else needs.
  `matmul` copies an operand whose rows are not contiguous. On the CPU, `quantized_matmul` copies every operand that is
  not contiguous as a whole, such as keys that several heads share or that do not fill their memory yet.
- On the CPU, an array is dropped when the last operation that reads it has run. On Metal, it is held until its command
  buffer is done. The host runs ahead of that, so no array is sure to be dropped before the end of an `eval`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import mlx.core as mx

EVAL_WIDTH = 20  # MLX_BFS_MAX_WIDTH

# Names of MLX's operations.
# fmt: off
VIEWS = frozenset((
    "AsStrided", "Broadcast", "BroadcastAxes", "Copy", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice",
    "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
))
# fmt: on
# fmt: off
IN_PLACE = frozenset((
    "Abs", "Add", "AsType", "BitwiseBinary", "Ceil", "Cos", "Divide", "Equal", "Erf", "Exp", "Expm1", "Floor",
    "Greater", "GreaterEqual", "LayerNorm", "Less", "LessEqual", "Log", "Log1p", "LogAddExp", "LogicalAnd",
    "LogicalNot", "LogicalOr", "Maximum", "Minimum", "Multiply", "Negative", "NotEqual", "Power", "RMSNorm",
    "Remainder", "RoPE", "Round", "Rsqrt", "Select", "Sigmoid", "Sign", "Sin", "SliceUpdate", "Softmax", "Sqrt",
    "Square", "Subtract", "Tan", "Tanh",
))
# fmt: on
COPIES_ROWS = frozenset(("AddMM", "GatherMM", "GatherQMM", "Matmul"))
COPIES_ALL = frozenset(("LayerNorm", "RMSNorm", "RoPE", "ScaledDotProductAttention", "Sort"))

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Array:
    """One array of a graph; `name` is its name there."""

    name: str
    shape: Shape
    item_bytes: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.item_bytes


@dataclass(frozen=True, eq=False)
class Operation:
    name: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    arguments: Sequence[Any]


@dataclass
class Graph:
    """The graph of a traced function. inputs, outputs: the function's, in its order."""

    inputs: list[Array] = field(default_factory=list)
    outputs: list[Array] = field(default_factory=list)
    makes: dict[str, Operation] = field(default_factory=dict)  # name of an array -> the operation that makes it


def trace(function: Callable[..., list[mx.array]], *inputs: mx.array) -> Graph:
    """The graph that `function` builds for arrays of the shapes and types of `inputs`; nothing is evaluated.

    Raises ValueError for an operation that MLX cannot describe.
    """
    graph = Graph()

    def note(event: dict[str, Any]) -> None:
        def arrays(key: str) -> list[Array]:
            return [Array(name, tuple(shape), dtype.size) for name, shape, dtype in event[key]]

        if event["type"] == "inputs":
            graph.inputs = arrays("inputs")
        elif event["type"] == "outputs":
            graph.outputs = arrays("outputs")
        elif event["type"] == "primitive":
            made = arrays("outputs")
            operation = Operation(event["name"], tuple(arrays("inputs")), tuple(made), event["arguments"])
            graph.makes.update({array.name: operation for array in made})

    with _describable():
        mx.export_function(note, function, *inputs)  # type: ignore[arg-type]
    return graph


@contextmanager
def _describable() -> Iterator[None]:
    """Replaces what MLX cannot do without numbers, while a function is traced.

    `mx.contiguous`, which MLX cannot describe, is a product by 1, which also makes a new array. Neither can it describe
    conversions to and from 8 bits, which become other conversions to the same types. `mx.eval` does nothing.
    Numbers that a model reads back, such as the rows of a table that it needs, are 0.
    """
    names: list[tuple[Any, str]] = [(mx, "contiguous"), (mx, "to_fp8"), (mx, "from_fp8"), (mx, "eval")]
    names += [(mx, "async_eval"), (mx.array, "item"), (mx.array, "tolist")]
    real = {name: getattr(where, name) for where, name in names}

    def skipped(evaluate: Callable[..., None], *arrays: Any) -> None:
        with suppress(ValueError):
            evaluate(*arrays)

    def number(array: mx.array) -> Any:
        try:
            return real["item"](array)
        except ValueError:
            return zero_of(array)

    def numbers(array: mx.array) -> Any:
        try:
            return real["tolist"](array)
        except ValueError:
            return zeros_of(array, array.shape)

    def zero_of(array: mx.array) -> Any:
        return real["item"](mx.zeros((), array.dtype))

    def zeros_of(array: mx.array, shape: Shape) -> Any:
        return [zeros_of(array, shape[1:]) for _ in range(shape[0])] if shape else zero_of(array)

    instead: list[Callable[..., Any]] = [
        lambda array, *_, **__: array * 1,
        lambda array, *_, **__: array.astype(mx.uint8),
        lambda array, dtype=mx.bfloat16, **__: array.astype(dtype),
        partial(skipped, mx.eval),
        partial(skipped, mx.async_eval),
    ]
    try:
        for (where, name), stand_in in zip(names, [*instead, number, numbers], strict=True):
            setattr(where, name, stand_in)
        yield
    finally:
        for where, name in names:
            setattr(where, name, real[name])


@dataclass(frozen=True)
class Evaluation:
    """One call of `mx.eval`, and the memory that is used right after it.

    arrays: names of the arrays to evaluate. besides: bytes that are taken while these arrays exist, and given back.
    brings: arrays that then come from elsewhere, such as the result of a layer that used them.
    """

    arrays: Sequence[str]
    besides: int = 0
    brings: Sequence[Array] = ()


@dataclass(frozen=True)
class _Stored:
    memory: str  # name of the array that it was allocated for
    strides: Shape


def peak_bytes(graph: Graph, evaluations: Sequence[Evaluation], held: Sequence[Array], drops_late: bool) -> int:
    """The most bytes that `held` and the arrays made by the operations take at once.

    held: inputs that are in memory before, and that nothing else keeps. Inputs that are neither held nor brought do not
    count, because they are resident anyway. drops_late: whether arrays are dropped only at the end of an evaluation, as
    on Metal.
    """
    return _Memory(graph, evaluations, held, drops_late).peak


class _Memory:
    def __init__(
        self, graph: Graph, evaluations: Sequence[Evaluation], held: Sequence[Array], drops_late: bool
    ) -> None:
        self.drops_late = drops_late
        self.live = self.peak = 0
        self.late: list[int] = []
        self.sizes: dict[str, int] = {}  # memory -> bytes
        self.sharing: Counter[str] = Counter()  # memory -> number of arrays in it
        self.stored: dict[str, _Stored] = {}
        self.uses = _uses(graph, evaluations)  # how often each array will still be read
        self.all_uses = dict(self.uses)
        done: set[str] = set()
        for array in held:
            self._allocate(array)
        for evaluation in evaluations:
            for operation in eval_order(graph, evaluation.arrays, done):
                self._run(operation)
                done.update(array.name for array in operation.outputs)
            self.peak = max(self.peak, self.live + evaluation.besides)
            for array in evaluation.brings:
                self._allocate(array)
            for name in evaluation.arrays:
                self._used(name)
            self.live -= sum(self.late)
            self.late.clear()

    def _run(self, operation: Operation) -> None:
        strides = [self._strides(array) for array in operation.inputs]
        copies = _copied_bytes(operation, strides, on_cpu=not self.drops_late)
        views = [_view(operation, strides[0], array.shape) if operation.inputs else None for array in operation.outputs]
        for array, view in zip(operation.outputs, views, strict=True):
            taken_over = self._taken_over(operation, strides, array)
            if view is not None:
                self._share(array, operation.inputs[0].name, view)
            elif taken_over is not None:
                self._share(array, taken_over, row_major(array.shape))
            else:
                self._allocate(array)
        self.peak = max(self.peak, self.live + copies)
        if copies and self.drops_late:
            self.live += copies
            self.late.append(copies)
        for array in operation.outputs:
            if not self.all_uses.get(array.name):
                self._drop(array.name)
        for array in operation.inputs:
            self._used(array.name)

    def _strides(self, array: Array) -> Shape:
        return self.stored[array.name].strides if array.name in self.stored else row_major(array.shape)

    def _taken_over(self, operation: Operation, strides: list[Shape], output: Array) -> str | None:
        """The operand whose memory the result may take over, because nothing else needs it and it has the same size."""
        if operation.name not in IN_PLACE:
            return None
        for array, stride in zip(operation.inputs, strides, strict=True):
            stored = self.stored.get(array.name)
            if (
                stored is not None
                and self.all_uses[array.name] == 1  # otherwise an earlier reader may not have run yet
                and self.sharing[stored.memory] == 1
                and self.sizes.get(stored.memory) == array.nbytes == output.nbytes
                and is_row_major(array.shape, stride)
            ):
                return array.name
        return None

    def _allocate(self, array: Array) -> None:
        self.sizes[array.name] = array.nbytes
        self.live += array.nbytes
        self.sharing[array.name] += 1
        self.stored[array.name] = _Stored(array.name, row_major(array.shape))
        self.peak = max(self.peak, self.live)

    def _share(self, array: Array, other: str, strides: Shape) -> None:
        memory = self.stored[other].memory if other in self.stored else other
        self.sharing[memory] += 1
        self.stored[array.name] = _Stored(memory, strides)

    def _used(self, name: str) -> None:
        self.uses[name] -= 1
        if not self.uses[name]:
            self._drop(name)

    def _drop(self, name: str) -> None:
        if (stored := self.stored.get(name)) is None:
            return
        self.sharing[stored.memory] -= 1
        if self.sharing[stored.memory]:
            return
        size = self.sizes.pop(stored.memory, 0)
        if self.drops_late:
            self.late.append(size)
        else:
            self.live -= size


def _uses(graph: Graph, evaluations: Sequence[Evaluation]) -> Counter[str]:
    """How often each array is read by the operations that `evaluations` need, and by the evaluations themselves."""
    uses = Counter(name for evaluation in evaluations for name in evaluation.arrays)
    seen: set[Operation] = set()
    names = list(uses)
    while names:
        operation = graph.makes.get(names.pop())
        if operation is None or operation in seen:
            continue
        seen.add(operation)
        for array in operation.inputs:
            uses[array.name] += 1
            names.append(array.name)
    return uses


def eval_order(graph: Graph, wanted: Sequence[str], done: set[str]) -> list[Operation]:
    """The operations that make `wanted` and are not `done`, in the order in which MLX takes them."""

    def open_inputs(names: Sequence[str]) -> list[Operation]:
        return [graph.makes[name] for name in names if name in graph.makes and name not in done]

    def inputs_of(operation: Operation) -> list[Operation]:
        return open_inputs([array.name for array in operation.inputs])

    degree: Counter[Operation] = Counter()
    waiting = [open_inputs(wanted)]
    while waiting:
        for operation in waiting.pop():
            degree[operation] += 1
            if degree[operation] == 1:
                waiting.append(inputs_of(operation))
    tape: list[list[Operation]] = [open_inputs(wanted)]  # for each operation in the order, its inputs
    order: list[Operation] = []
    later: list[tuple[int, int]] = []  # place in the tape, input to continue with
    place = 0
    while place < len(tape) or later:
        current, start = (place, 0) if place < len(tape) else later.pop()
        place += current == place
        for number in range(start, len(tape[current])):
            if len(tape) - place >= EVAL_WIDTH:
                later.append((current, number))
                break
            operation = tape[current][number]
            degree[operation] -= 1
            if not degree[operation]:
                order.append(operation)
                tape.append(inputs_of(operation))
    return order[::-1]


# -- the layout of an array ----------------------------------------------------------------------------------------


def row_major(shape: Shape) -> Shape:
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def is_row_major(shape: Shape, strides: Shape) -> bool:
    return all(n == 1 or a == b for n, a, b in zip(shape, strides, row_major(shape), strict=True))


def _copied_bytes(operation: Operation, strides: list[Shape], on_cpu: bool) -> int:
    """Bytes of the operands that an operation copies first, because it needs another layout."""
    if operation.name == "QuantizedMatmul":
        fits = is_row_major if on_cpu else _is_matrix
        operands = list(zip(operation.inputs, strides, strict=True))
        return sum(array.nbytes for array, stride in operands if not fits(array.shape, stride))
    if operation.name in COPIES_ROWS:
        operands = list(zip(operation.inputs, strides, strict=True))[:2]
        return sum(array.nbytes for array, stride in operands if not _is_matrix(array.shape, stride))
    if operation.name in COPIES_ALL:
        operands = list(zip(operation.inputs, strides, strict=True))[:3]
        return sum(array.nbytes for array, stride in operands if not is_row_major(array.shape, stride))
    return 0


def _is_matrix(shape: Shape, strides: Shape) -> bool:
    """Whether the last two axes form a row-major or column-major matrix."""
    if len(shape) < 2:
        return True
    (rows, columns), (step, one) = shape[-2:], strides[-2:]
    by_rows = (columns == 1 or one == 1) and (rows == 1 or step == columns)
    by_columns = (rows == 1 or step == 1) and (columns == 1 or one == rows)
    return by_rows or by_columns


def _view(operation: Operation, strides: Shape, shape: Shape) -> Shape | None:
    """The strides of a result (of `shape`) that is a view of the first input; None if numbers are copied."""
    if operation.name not in VIEWS:
        return None
    before = operation.inputs[0].shape
    match operation.name:
        case "Transpose":
            return tuple(strides[axis] for axis in operation.arguments[0])
        case "Slice":
            return tuple(stride * step for stride, step in zip(strides, operation.arguments[2], strict=True))
        case "Split" | "Copy" | "Depends" | "StopGradient":
            return strides
        case "Broadcast" | "BroadcastAxes":
            lacking = len(shape) - len(before)
            lengths, steps = (1,) * lacking + before, (0,) * lacking + strides
            return tuple(0 if a != b else s for a, b, s in zip(lengths, shape, steps, strict=True))
        case "AsStrided" | "View":
            return row_major(shape)
    return row_major(shape) if is_row_major(before, strides) else _reshaped(before, strides, shape)


def _reshaped(before: Shape, strides: Shape, shape: Shape) -> Shape | None:
    """The strides if axes were only split, or have length 1; None if axes were joined."""
    axes = [(length, stride) for length, stride in zip(before, strides, strict=True) if length != 1]
    result, left, step = [], 1, 0
    for length in shape:
        if length == 1:
            result.append(0)
            continue
        if left == 1:
            if not axes:
                return None
            left, step = axes.pop(0)
        if left % length:
            return None
        left //= length
        result.append(step * left)
    return tuple(result)
