"""No kernel and no operand depends on the memory budget, not even on Metal, which picks kernels by a call's shapes.

Metal is not needed. The tests record every product that a model asks MLX for. MLX's rules (metal_kernels.py) give the
kernel that each pair of a row and a matrix would use on every generation of chip.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import metal_kernels as rules  # type: ignore[import-not-found]  # found beside this file
import mlx.core as mx
import numpy as np
import pytest
from mixtures import VOCABULARY, make_mixture, open_streamed, to_bfloat16  # type: ignore[import-not-found]
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import load_model

from mlx_flash.layers import expert_products
from mlx_flash.layers import experts as layer_module

pytestmark = pytest.mark.usefixtures("one_processor")

EXPERTS, CHOICES = 12, 4  # in the mixture below
LENGTHS = (1, 15, 16, 75, 147, 192, 530)  # of prompts, at and just below MLX's changes of kernel


class Recorder:
    """Records the later calls of `mx.gather_qmm`, `mx.gather_mm`, `mx.quantized_matmul` and `@`.

    products: (kernel on every chip, row, matrix) -> number of calls. Rows and matrices are hashes of their bytes.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.products: Counter[tuple[Any, ...]] = Counter()
        for name in ("gather_qmm", "gather_mm", "quantized_matmul"):
            monkeypatch.setattr(mx, name, functools.partial(getattr(self, name), getattr(mx, name)))
        matmul, recorder = mx.array.__matmul__, self
        monkeypatch.setattr(mx.array, "__matmul__", lambda a, b: recorder.matmul(matmul, a, b))

    def take(self) -> Counter[tuple[Any, ...]]:
        taken, self.products = self.products, Counter()
        return taken

    def gather_qmm(
        self, call: Any, x: mx.array, w: mx.array, *parts: Any, rhs_indices: mx.array, **options: Any
    ) -> Any:
        inner, outer = x.shape[-1], w.shape[-2]
        shape = (rhs_indices.size, x.shape[-2], inner, outer, len(w), options["sorted_indices"], options["bits"])
        kernel = tuple(rules.gather_qmm(chip, *shape) for chip in rules.CHIPS)
        self._pairs(kernel, x, rhs_indices, w, *(part for part in parts if part is not None))
        return call(x, w, *parts, rhs_indices=rhs_indices, **options)

    def gather_mm(self, call: Any, x: mx.array, w: mx.array, *, rhs_indices: mx.array, sorted_indices: bool) -> Any:
        shape = (rhs_indices.size, *x.shape[-2:], w.shape[-1], len(w), sorted_indices)
        kernel = tuple(rules.gather_mm(chip, *shape) for chip in rules.CHIPS)
        self._pairs(kernel, x, rhs_indices, w)
        wide = (a.astype(mx.float32) for a in (x, w))  # MLX's CPU backend only has float32 here
        return call(*wide, rhs_indices=rhs_indices, sorted_indices=sorted_indices).astype(x.dtype)

    def quantized_matmul(self, call: Any, x: mx.array, w: mx.array, *parts: Any, **options: Any) -> Any:
        transpose, bits, group_size = options["transpose"], options["bits"], options["group_size"]
        rows = x.reshape(-1, x.shape[-1])
        outer = len(w) if transpose else w.shape[-1] * 32 // bits
        shape = (*rows.shape, outer, transpose, bits, group_size)
        kernel = (len(rows), *(rules.quantized_matmul(chip, *shape) for chip in rules.CHIPS))
        matrix = tuple(_hash(part) for part in (w, *parts) if part is not None)
        self.products.update((kernel, row, matrix) for row in _rows(rows))
        return call(x, w, *parts, **options)

    def matmul(self, call: Any, a: mx.array, b: mx.array) -> Any:
        """Records everything that a rule could depend on."""
        self.products[(a.shape, b.shape, a.dtype, b.dtype), _hash(a), _hash(b)] += 1
        return call(a, b)

    def _pairs(self, kernel: Any, x: mx.array, indices: mx.array, *parts: mx.array) -> None:
        """x: (..., M, inner), with leading axes that broadcast to those of `indices`. parts: (slots, ...) each."""
        slots = np.array(indices).ravel()
        hashes = [_rows(part.reshape(len(part), -1)) for part in parts]
        matrices = list(zip(*hashes, strict=True))
        rows = mx.broadcast_to(x, (*indices.shape, *x.shape[-2:])).reshape(len(slots), -1)
        self.products.update((kernel, row, matrices[slot]) for row, slot in zip(_rows(rows), slots, strict=True))


def _raw(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def _hash(array: mx.array) -> int:
    return hash(_raw(array).tobytes())


def _rows(array: mx.array) -> list[int]:
    """A hash of each row of an (n, m) array."""
    return [hash(row.tobytes()) for row in _raw(array)]


@pytest.fixture(scope="module")
def mixture_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @functools.cache
    def make(kind: str, family: str = "qwen3_moe", layers: int = 1) -> Path:
        folder = tmp_path_factory.mktemp("mixture")
        make_mixture(folder, family, "plain" if kind == "bfloat16" else kind, num_hidden_layers=layers)
        if kind == "bfloat16":
            to_bfloat16(folder)
        return folder

    return make


@pytest.fixture
def as_on_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes models ask for the same products as on Metal."""
    monkeypatch.setattr(layer_module, "kernels_vary", lambda: True)
    monkeypatch.setattr(layer_module, "is_widened", lambda *_: False)


def calls_of(length: int) -> list[list[int]]:
    """A prompt in mlx-lm's chunks. A short one is followed by a token, a few tokens, and as many as a prompt's."""
    tokens = np.random.default_rng(length).integers(0, VOCABULARY, length + 20).tolist()
    after = [tokens[length : length + 1], tokens[length + 1 : length + 4], tokens[length + 4 :]]
    return [tokens[begin : min(begin + 512, length)] for begin in range(0, length, 512)] + after[: 3 * (length < 40)]


def run(model: Any, length: int) -> None:
    cache = make_prompt_cache(model)
    for call in calls_of(length):
        mx.eval(model(mx.array([call]), cache=cache))


@pytest.mark.parametrize(
    ("kind", "budgets"),
    [("4 bits", (2, EXPERTS // 4, EXPERTS)), ("8 bits", (EXPERTS // 4, EXPERTS)), ("bfloat16", (2, EXPERTS))],
)
@pytest.mark.usefixtures("as_on_metal")
def test_a_mixtures_products_do_not_depend_on_the_budget(
    mixture_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str, budgets: tuple[int, ...]
) -> None:
    recorder = Recorder(monkeypatch)
    expected: dict[int, Counter[tuple[Any, ...]]] = {}
    for slots in budgets:
        model, streamer = open_streamed(mixture_of(kind), slots)
        recorder.take()  # of the trial calls that find the model's layers
        for layer in model.layers:
            layer.mlp.switch_mlp.ahead = None  # the text does not depend on the guess
        for length in LENGTHS if slots % 2 else LENGTHS[::-1]:
            # Start cold or with the last prompt's slots, then warm. Longer prompts fill the slots like the others.
            for time in ("first", "again")[: 1 + (length < 100)]:
                streamer.overlap = time == "first"
                run(model, length)
                found = recorder.take()
                if length in expected:
                    differing = {product[0] for product in (found - expected[length]) + (expected[length] - found)}
                    assert not differing, (slots, length, time, differing)
                expected.setdefault(length, found)
        streamer.close()
    assert len(expected) == len(LENGTHS)


@pytest.mark.parametrize(
    ("name", "predictor"),
    [
        ("4 bits", "none"),
        ("4 bits", "shadow"),
        ("gated 8 bits", "shadow"),
        ("float16", "exact"),
        ("float16", "lowrank"),
    ],
)
def test_neurons_products_do_not_depend_on_the_budget(
    tiny_of: Callable[[str], Any],
    open_model: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    predictor: str,
) -> None:
    expected: list[Counter[tuple[Any, ...]]] = []
    tiny = tiny_of(name)
    for slots in (None, max(2, tiny.manifest.layout.blocks // 8)):
        model = open_model(tiny.store, slots, predictor)
        for layer in model.layers:
            layer.mlp.ahead = None  # the text does not depend on the guess
        with monkeypatch.context() as patched:  # not while the model is loaded, because its graph is traced then
            recorder = Recorder(patched)
            for time in ("first", "again"):
                run(model, 4)
                run(model, 30)
                expected.append(recorder.take())
                assert expected[-1] == expected[0], (slots, time)


@pytest.mark.parametrize(
    ("kind", "family", "layers"),
    [
        ("plain", "mixtral", 2),
        ("4 bits", "gpt_oss", 2),
        ("8 bits", "nemotron_h", 4),
        ("mxfp4", "qwen3_moe", 2),
        ("nvfp4", "qwen3_moe", 2),
    ],
)
@pytest.mark.usefixtures("as_on_metal")
def test_expert_by_expert_is_what_mlx_lm_computes(
    mixture_of: Callable[..., Path], kind: str, family: str, layers: int
) -> None:
    """Equal to the bit on this backend, except for unpacked matrices, which another library multiplies."""
    folder = mixture_of(kind, family, layers)
    tokens = mx.array(np.random.default_rng(0).integers(0, VOCABULARY, (1, 70)))
    plain = load_model(folder)[0](tokens)
    first = None
    for slots in (2, 12):
        model, streamer = open_streamed(folder, slots)
        for _ in range(2):
            found = model(tokens)
            first = found if first is None else first
            assert mx.array_equal(found, first), "the same at every budget"
            if kind == "plain":
                assert mx.abs(found - plain).max() < 1e-4 * mx.abs(plain).max()
            else:
                assert mx.array_equal(found, plain)
        streamer.close()


def test_a_matrix_with_a_scale_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the GPU has such a product. Here the scale is applied to the result instead."""
    real, weight = mx.gather_qmm, mx.random.normal((3, 64, 64))
    quantised: Any = mx.quantize(weight, mode="nvfp4", group_size=16, bits=4)
    packed, scales = quantised
    linear = QuantizedSwitchLinear(64, 64, 3, bias=False, group_size=16, bits=4, mode="nvfp4")
    linear.weight, linear.scales, linear.global_scale = packed, scales, mx.array([1.0, 2.0, 3.0])
    monkeypatch.setattr(
        mx, "gather_qmm", lambda *arrays, global_scale, **options: real(*arrays, **options) * global_scale
    )
    x = mx.random.normal((5, 64))
    plain = mx.quantized_matmul(x, packed[2], scales[2], mode="nvfp4", group_size=16, bits=4)
    assert mx.array_equal(expert_products._product(linear, x, 2), 3 * plain)


def test_the_rules_are_of_the_installed_mlx() -> None:
    """Patch releases are not checked here; `python tests/metal_kernels.py` compares those."""
    installed = importlib.metadata.version("mlx")
    assert installed.split(".")[:2] == rules.MLX_VERSION.split(".")[:2]
    assert (rules.difference() is None) == (installed == rules.MLX_VERSION)
