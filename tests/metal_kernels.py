"""The rules by which MLX's Metal backend chooses the kernel of a product, as functions of what a caller can see.

The rules were read in mlx/backend/metal/quantized.cpp and matmul.cpp of MLX 0.32.2 (commit 846d176). They were compared
with 0.32.4: with the kernels' headers and the machine code of libmlx.dylib in the wheel
mlx_metal-0.32.4-py3-none-macosx_14_0_arm64. Where the two differ, the rules follow 0.32.4. Nothing was run on a Mac.

`python tests/metal_kernels.py` checks that the installed MLX is the version of these rules, and fails if it is not.
"""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import dataclass

MLX_VERSION = "0.32.4"


@dataclass(frozen=True)
class Chip:
    """An Apple GPU in MLX's terms: the name of its architecture ("applegpu_g13s") and the version of macOS."""

    generation: int  # 13: M1, 14: M2, 15: M3, 16: M4, 17: M5
    size: str  # g: base, s and c: Pro and Max, d: Ultra
    macos_26_2: bool = True

    @property
    def nax(self) -> bool:
        """Whether MLX uses the matrix units of M5 and later (device.cpp:947, is_nax_available)."""
        return self.macos_26_2 and self.generation >= 17


CHIPS = (
    *(Chip(generation, size) for generation in (13, 14, 15, 16, 17) for size in "gsd"),
    Chip(17, "s", macos_26_2=False),
)


def vector_limit(chip: Chip, inner: int, outer: int) -> int:
    """The number of rows from which MLX computes a quantised matrix product (quantized.cpp:85, get_qmv_batch_limit)."""
    widest = max(inner, outer)
    if chip.generation >= 17 and chip.size != "d":
        return 33 if widest <= 2048 else 25 if widest <= 4096 else 13
    if chip.generation >= 15 and chip.size != "d":
        return 13 if widest <= 2048 else 15 if widest <= 4096 else 13
    if chip.size == "d":
        return 32 if widest <= 2048 else 18 if widest <= 4096 else 12
    if chip.generation >= 13:
        largest = 7 if (chip.generation, chip.size) == (13, "s") else 6  # 7 since 0.32.4
        return 14 if widest <= 2048 else 10 if widest <= 4096 else largest
    return 18 if widest <= 2048 else 12 if widest <= 4096 else 10


def _vector_kernel(inner: int, outer: int, bits: int) -> str:
    """The part of the kernel's name that says how a row is summed (quantized.cpp:147, qmv_fast_k_alignment)."""
    per_pack = 8 if bits in (3, 5) else 4 if bits == 6 else 32 // bits
    aligned = inner % (per_pack * (1 if bits == 2 else 2) * 32) == 0
    return "fast" if aligned and outer % 8 == 0 else "partial rows" if aligned else "any"


def quantized_matmul(chip: Chip, rows: int, inner: int, outer: int, transpose: bool, bits: int, group_size: int) -> str:
    """(rows, inner) x one affine packed matrix -> (rows, outer) (quantized.cpp:1782, QuantizedMatmul::eval_gpu)."""
    if rows >= (vector_limit(chip, inner, outer) if transpose else 4):
        parts = max(1, min(512 // (-(-outer // 32) * -(-rows // 32)), inner // max(32, group_size)))
        while transpose and parts > 1 and inner % (parts * max(32, group_size)):
            parts -= 1
        if transpose and parts > 1:
            return f"qmm_t_splitk parts {parts} aligned {outer % 32 == 0}"
        if chip.nax and inner % 64 == 0 and (transpose or outer % 64 == 0):
            return f"qmm_nax transpose {transpose} bm {32 if rows <= 32 else 64} aligned {outer % 64 == 0}"
        return f"qmm transpose {transpose} aligned {outer % 32 == 0}"
    if not transpose:
        return "qvm" if inner < 1024 else f"qvm_split_k {32 if inner > 8192 else 8}"
    if inner in (64, 128) and bits & (bits - 1) == 0:
        return f"qmv_quad {inner}"
    if rows >= 2 and chip.generation >= 15:
        return f"qmv_wide {-(-rows // -(-rows // 5))}"
    return f"qmv {_vector_kernel(inner, outer, bits)}"


def gather_qmm(
    chip: Chip, pairs: int, rows: int, inner: int, outer: int, matrices: int, is_sorted: bool, bits: int
) -> str:
    """`pairs` matrices (rows, inner), each times one of `matrices` packed ones, transposed (quantized.cpp:1877).

    matrices: the number in the weight array. The index of a pair selects one of them.
    """
    if rows == 1 and pairs >= 16 and is_sorted and pairs // matrices >= 4:
        if not chip.nax:
            return f"gather_qmm_rhs aligned {outer % 32 == 0}"
        return f"gather_qmm_rhs_nax bm {32 if pairs // matrices < 64 else 64} aligned {outer % 64 == 0}"
    if rows >= vector_limit(chip, inner, outer):
        if chip.nax and inner % 64 == 0:
            return f"gather_qmm_nax aligned {outer % 64 == 0}"
        return f"gather_qmm aligned {outer % 32 == 0}"
    fast = _vector_kernel(inner, outer, bits) == "fast"
    return f"gather_qmv {'fast' if fast else 'any'}"


def gather_mm(chip: Chip, pairs: int, rows: int, inner: int, outer: int, matrices: int, is_sorted: bool) -> str:
    """The same for plain matrices (matmul.cpp:2811, GatherMM::eval_gpu). Omits unused cases of several rows."""
    if rows == 1 and is_sorted:
        if not chip.nax:
            return "gather_mm_rhs"
        share = pairs // matrices
        return f"gather_mm_rhs_nax bm {64 if share > 48 else 32 if share > 24 else 16}"
    return "gather_mv" if rows == 1 else f"gather_mm {rows}"


def difference() -> str | None:
    """The remedy if the installed MLX is not the version that the rules were read from, or None."""
    installed = importlib.metadata.version("mlx")
    if installed == MLX_VERSION:
        return None
    return (
        f"tests/metal_kernels.py has the rules of MLX {MLX_VERSION}, but {installed} is installed. Read "
        "GatherQMM, QuantizedMatmul and GatherMM of mlx/backend/metal/ again, correct the rules and their version."
    )


if __name__ == "__main__":
    sys.exit(difference())
