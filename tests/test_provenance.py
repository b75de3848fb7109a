"""Where a parameter's bytes lie after a zoo's `sanitize` moved its tensors: the files give what MLX evaluates."""

from __future__ import annotations

import contextlib
import math
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_flash.errors import UnsupportedModelError
from mlx_flash.flash.in_place import TensorParts
from mlx_flash.flash.safetensors_file import TensorEntry, read_header
from mlx_flash.loading.moves import follow
from mlx_flash.loading.provenance import Provenance, locate
from mlx_flash.source.zoos import MLX_VLM

Tensors = dict[str, Any]
SHAPES = {"a": (4, 6, 8), "b": (4, 6, 8), "c": (6, 8), "d": (12, 16), "bytes": (2, 4, 16)}


class Files:
    """Two safetensors files with distinct numbers in every tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths = [folder / "one.safetensors", folder / "two.safetensors"]
        tensors = {
            name: mx.arange(math.prod(shape)).reshape(shape) + 1000 * number
            for number, (name, shape) in enumerate(SHAPES.items())
        }
        tensors["bytes"] = (tensors["bytes"] % 251).astype(mx.uint8)
        for path, names in zip(self.paths, (("a", "c", "bytes"), ("d", "b")), strict=True):
            mx.save_safetensors(str(path), {name: tensors[name] for name in names})
        self.entries: dict[str, tuple[int, TensorEntry]] = {
            name: (number, entry)
            for number, path in enumerate(self.paths)
            for name, entry in read_header(path)[1].items()
        }

    def watch(self, sanitize: Callable[[Tensors], Tensors]) -> tuple[Provenance, Tensors]:
        weights: Tensors = {}
        for path in self.paths:
            loaded: Any = mx.load(str(path))
            weights |= loaded
        provenance = Provenance()
        return provenance, provenance.watch(sanitize, weights)

    def locate(self, key: str, array: mx.array, provenance: Provenance) -> TensorParts:
        return locate(self.folder, key, array, provenance, self.entries)

    def read(self, parts: TensorParts) -> bytes:
        contents = [path.read_bytes() for path in self.paths]
        return b"".join(
            contents[file][offset : offset + parts.nbytes]
            for file, offset in zip(parts.file_of.tolist(), parts.offsets.tolist(), strict=True)
        )


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def assert_same_bytes(files: Files, key: str, array: mx.array, provenance: Provenance) -> None:
    parts = files.locate(key, array, provenance)
    assert len(parts.offsets) == len(parts.file_of) == array.shape[0] and parts.shape == array.shape[1:]
    assert parts.dtype == array.dtype
    assert files.read(parts) == np.array(array).tobytes()


STAYS: dict[str, Callable[[Tensors], mx.array]] = {
    "identity": lambda w: w["a"],
    "stack": lambda w: mx.stack([w["a"][2], w["c"], w["b"][1]]),
    "stack of whole tensors": lambda w: mx.stack([w["a"], w["b"]]),
    "concatenation": lambda w: mx.concatenate([w["b"], w["a"][1:3], w["c"][None]]),
    "first half of the rows": lambda w: mx.split(w["a"], 2, axis=-2)[0],
    "second half of the rows, copied": lambda w: mx.contiguous(mx.split(w["a"], 2, axis=-2)[1]),
    "rows by a slice": lambda w: w["a"][..., 2:5, :],
    "every second expert": lambda w: w["a"][::2],
    "experts backwards": lambda w: w["a"][::-1],
    "uneven split": lambda w: mx.split(w["d"], [3, 4], axis=0)[2],
    "half of a bias": lambda w: w["d"][:, 8:],
    "one expert": lambda w: w["a"][-1],
    "rows of a matrix, as experts": lambda w: w["d"].reshape(3, 4, 16),
    "experts' rows, flattened": lambda w: w["a"].reshape(24, 8),
    "flatten": lambda w: w["a"].flatten(1),
    "unflatten": lambda w: mx.unflatten(w["d"], 0, (2, 6)),
    "squeeze": lambda w: w["a"][:, None].squeeze(1),
    "bytes as words": lambda w: w["bytes"].view(mx.uint32),
    "bytes as words, flattened, half": lambda w: w["bytes"].view(mx.uint32).flatten(-2)[:, 8:],
    "words as halves": lambda w: w["a"].view(mx.uint16),
    "transposed and back": lambda w: w["a"].swapaxes(1, 2).swapaxes(2, 1),
    "the same type": lambda w: w["a"].astype(mx.int32),
    "split of a stack": lambda w: mx.split(mx.stack([w["a"][0], w["b"][0], w["c"]]), 2, axis=1)[1],
    "part of a stack": lambda w: mx.stack([w["c"], w["a"][0], w["a"][1]])[1:],
    "stack, reshaped": lambda w: mx.stack([w["a"][0], w["c"]]).reshape(4, 3, 8),
    "numbers": lambda w: mx.stack([w["c"], w["a"][3]]).reshape(-1),
}  # fmt: skip
CHANGES: dict[str, Callable[[Tensors], mx.array]] = {
    "transposed": lambda w: w["a"].swapaxes(1, 2),
    "experts inside rows": lambda w: w["a"].transpose(1, 0, 2),
    "every second row": lambda w: w["a"][:, ::2],
    "columns": lambda w: w["a"][..., :4],
    "columns split": lambda w: mx.split(w["a"], 2, axis=-1)[0],
    "computed": lambda w: w["a"] + 1,
    "another type": lambda w: w["a"].astype(mx.float32),
    "padded": lambda w: mx.pad(w["a"], [(0, 0), (0, 1), (0, 0)]),
    "joined rows": lambda w: mx.concatenate([w["a"], w["b"]], axis=1),
    "repeated": lambda w: mx.repeat(w["a"], 2, axis=1),
    "transposed and flattened": lambda w: w["a"].swapaxes(0, 1).reshape(4, 48),
    "from 8 bits": lambda w: mx.from_fp8(w["bytes"], dtype=mx.bfloat16),
    "a constant": lambda w: mx.zeros((4, 6, 8)),
    "experts of a choice": lambda w: w["a"][mx.argsort(w["c"][:, 0])[:4]],
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_in_place(files: Files, name: str) -> None:
    provenance, made = files.watch(lambda weights: {"x": STAYS[name](weights)})
    assert_same_bytes(files, "x", made["x"], provenance)


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed(files: Files, name: str) -> None:
    provenance, made = files.watch(lambda weights: {"x": CHANGES[name](weights), "same": weights["d"]})
    with pytest.raises(UnsupportedModelError, match=r"does not store x in the form .*mlxflash convert --model /"):
        files.locate("x", made["x"], provenance)
    assert_same_bytes(files, "same", made["same"], provenance)


def test_what_is_changed_after_sanitize_is_not_taken_for_the_checkpoints(files: Files) -> None:
    provenance, made = files.watch(lambda weights: dict(weights))
    with pytest.raises(UnsupportedModelError, match="does not store a in the form that the model computes with"):
        files.locate("a", made["a"] * 2, provenance)
    with pytest.raises(UnsupportedModelError, match="does not store a in the form"):
        files.locate("a", made["b"], provenance)


def test_the_other_zoo_s_models_are_converted_by_that_zoo(files: Files) -> None:
    provenance, made = files.watch(lambda weights: {"x": weights["a"] + 1})
    provenance.zoo = MLX_VLM
    with pytest.raises(UnsupportedModelError, match=r"Convert .*`mlx_vlm\.convert --hf-path /"):
        files.locate("x", made["x"], provenance)


def test_one_tensor_is_the_source_of_two_parameters(files: Files) -> None:
    def sanitize(weights: Tensors) -> Tensors:
        fused = weights.pop("a")
        gate, up = mx.split(fused, 2, axis=1)
        return weights | {"gate": gate, "up": mx.contiguous(up), "pair": mx.stack([weights["c"], weights["b"][0]])}

    provenance, made = files.watch(sanitize)
    assert provenance.sources == {
        "b": ["b"], "c": ["c"], "d": ["d"], "bytes": ["bytes"], "gate": ["a"], "up": ["a"], "pair": ["c", "b"],
    }  # fmt: skip
    parts = {key: files.locate(key, array, provenance) for key, array in made.items()}
    for key, array in made.items():
        assert files.read(parts[key]) == np.array(array).tobytes()


def test_a_sanitize_that_evaluates_a_tensor(files: Files) -> None:
    """It cannot be traced. What it passes on unchanged is still found."""

    def sanitize(weights: Tensors) -> Tensors:
        half = weights["a"][:, 3:] if mx.any(weights["c"]).item() else weights["a"]
        return {"half": half, "d": weights["d"]}

    provenance, made = files.watch(sanitize)
    assert_same_bytes(files, "d", made["d"], provenance)
    with pytest.raises(UnsupportedModelError, match="mlxflash convert"):
        files.locate("half", made["half"], provenance)


def test_a_sanitize_that_fails(files: Files) -> None:
    with pytest.raises(KeyError, match="missing"):
        files.watch(lambda weights: {"x": weights["missing"]})


def test_a_long_table_takes_no_object_for_each_row(tmp_path: Path) -> None:
    """Only the offsets of a table's rows are kept, 8 bytes each."""
    table = mx.zeros((1 << 16, 4))
    mx.save_safetensors(str(tmp_path / "one.safetensors"), {"table": table})
    entries = {"table": (0, read_header(tmp_path / "one.safetensors")[1]["table"])}
    loaded: Any = mx.load(str(tmp_path / "one.safetensors"))
    provenance = Provenance()
    made = provenance.watch(lambda weights: {"rows": weights["table"]}, dict(loaded))
    parts = locate(tmp_path, "rows", made["rows"], provenance, entries)
    assert parts.file_of.strides == (0,) and parts.nbytes == 16
    assert np.array_equal(np.diff(parts.offsets), np.full((1 << 16) - 1, 16))


def test_other_threads_keep_their_contiguous_copies() -> None:
    """`mx.contiguous` is replaced while a `sanitize` is traced, for that thread alone."""
    begun, done = threading.Event(), threading.Event()

    def slow(weights: Tensors) -> Tensors:
        begun.set()
        assert done.wait(10)
        return weights

    contiguous = mx.contiguous
    thread = threading.Thread(target=follow, args=(slow, {"a": mx.zeros(2)}))
    thread.start()
    assert begun.wait(10)
    transposed = mx.zeros((2, 3)).T
    copied = mx.contiguous(transposed)
    done.set()
    thread.join()
    assert copied is not transposed and mx.contiguous is contiguous


# -- random programs ---------------------------------------------------------------------------------------------------


def _axis(draw: Any, array: mx.array) -> int:
    return draw(st.integers(0, array.ndim - 1))  # type: ignore[no-any-return]


def _step(draw: Any, pool: Sequence[mx.array]) -> Callable[[Sequence[Any]], Any]:
    """A random move, as a function of the arrays made so far."""
    at = draw(st.integers(0, len(pool) - 1))
    array = pool[at]
    shape, last = array.shape, array.ndim - 1
    kind = draw(
        st.sampled_from(
            ["slice", "split", "index", "reshape", "flatten", "swap", "stack", "join", "new", "view", "copy"]
        )
    )
    if kind == "slice":
        axis = _axis(draw, array)
        begin, end = sorted(draw(st.tuples(*[st.integers(0, shape[axis])] * 2)))
        step = draw(st.sampled_from([1, 1, 1, 2, -1]))
        cut = (slice(None),) * axis + (slice(begin, max(end, begin + 1)),)
        back = (slice(None),) * axis + (slice(None, None, step),)
        return lambda pool: pool[at][cut][back]
    if kind == "split":
        axis = _axis(draw, array)
        parts = draw(st.sampled_from([n for n in (1, 2, 3) if shape[axis] % n == 0]))
        which = draw(st.integers(0, parts - 1))
        return lambda pool: mx.split(pool[at], parts, axis=axis)[which]
    if kind == "index" and array.ndim > 1 and shape[0]:
        index = draw(st.integers(-shape[0], shape[0] - 1))
        return lambda pool: pool[at][index]
    if kind == "reshape" and array.size:
        first = draw(st.sampled_from([n for n in range(1, array.size + 1) if array.size % n == 0]))
        second = draw(st.sampled_from([n for n in range(1, 17) if (array.size // first) % n == 0]))
        return lambda pool: pool[at].reshape(first, -1, second)
    if kind == "flatten":
        begin = _axis(draw, array)
        end = draw(st.integers(begin, last))
        return lambda pool: pool[at].flatten(begin, end)
    if kind == "swap":
        one, two = _axis(draw, array), _axis(draw, array)
        return lambda pool: pool[at].swapaxes(one, two)
    if kind in ("stack", "join"):
        others = [i for i, other in enumerate(pool) if other.shape == shape and other.dtype == array.dtype]
        chosen = draw(st.lists(st.sampled_from(others), min_size=1, max_size=3))
        make: Any = mx.stack if kind == "stack" else mx.concatenate
        return lambda pool: make([pool[i] for i in chosen])
    if kind == "new" and array.ndim < 5:
        axis = draw(st.integers(0, array.ndim))
        return lambda pool: mx.expand_dims(pool[at], axis)
    if kind == "view" and array.size:
        other = draw(st.sampled_from([mx.uint8, mx.uint16, mx.uint32, mx.int32]))
        if shape[last] * array.dtype.size % other.size == 0:
            return lambda pool: pool[at].view(other)
    return lambda pool: mx.contiguous(pool[at])


@given(st.data())
def test_random_moves(data: st.DataObject) -> None:
    """Whatever is located has the bytes that MLX evaluates, for any composition of moves."""
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder))
        steps: list[Callable[[Sequence[Any]], Any]] = []

        def sanitize(weights: Tensors) -> Tensors:
            made = [weights[name] for name in SHAPES]
            for step in steps:
                made.append(step(made))
            return {str(number): array for number, array in enumerate(made)}

        pool = [*files.watch(sanitize)[1].values()]
        for _ in range(data.draw(st.integers(1, 8))):
            steps.append(_step(data.draw, pool))
            pool.append(steps[-1](pool))
        provenance, made = files.watch(sanitize)
        located = {}
        for key, array in made.items():  # Evaluating one array evaluates others.
            with contextlib.suppress(UnsupportedModelError):
                located[key] = files.locate(key, array, provenance)
        for key, parts in located.items():
            assert files.read(parts) == np.array(made[key]).tobytes()
