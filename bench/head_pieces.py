"""Does an output head give the same bits if it is applied in pieces of the vocabulary?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from mlx_flash.cli.run import whole_number
from mlx_flash.errors import UsageError

from .tools.report import environment

Rows = Callable[[int, int], mx.array]
"""The logits (1, T, last - first) of the vocabulary's rows from `first` to `last`."""

KINDS: dict[str, tuple[mx.Dtype, int]] = {  # dtype of the input, bits of the head; 0: in that dtype as well
    "float32": (mx.float32, 0),
    "float16": (mx.float16, 0),
    "bfloat16": (mx.bfloat16, 0),
    "8 bits": (mx.float32, 8),
    "4 bits": (mx.float32, 4),
}
GROUP_SIZE = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--vocabulary", type=whole_number(1024), default=49152, help="rows of the head (default: %(default)s)"
    )
    parser.add_argument(
        "--width",
        type=whole_number(GROUP_SIZE, 1 << 16),
        default=576,
        help="numbers per row, a multiple of 64 (default: %(default)s)",
    )
    parser.add_argument("--tokens", default="1,7,512", help="comma-separated numbers of tokens (default: %(default)s)")
    parser.add_argument(
        "--pieces", default="1000,1024,4096,32768", help="comma-separated rows of a piece (default: %(default)s)"
    )
    parser.add_argument(
        "--kinds",
        default=",".join(KINDS),
        help="comma-separated kinds of head (default: %(default)s)",
    )


def main(arguments: argparse.Namespace) -> None:
    kinds, tokens, pieces = _kinds(arguments.kinds), _numbers(arguments.tokens), _numbers(arguments.pieces)
    if arguments.width % GROUP_SIZE:
        raise UsageError(f"--width is {arguments.width}, expected a multiple of {GROUP_SIZE}.")
    rows = []
    with tqdm(total=len(kinds) * len(tokens), unit="row", dynamic_ncols=True) as bar:
        for kind in kinds:
            for count in tokens:
                mx.random.seed(count)
                head = head_of(kind, arguments.vocabulary, arguments.width, count)
                rows.append((kind, count, differences(head, arguments.vocabulary, pieces)))
                bar.update()
    print(f"{'head':<10}{'tokens':>8}" + "".join(f"{piece:>10}" for piece in pieces))
    for kind, count, found in rows:
        print(f"{kind:<10}{count:>8}" + "".join(f"{f'{100 * share:.2g}%' if share else 'same':>10}" for share in found))
    result = {"command": "head-pieces", "vocabulary": arguments.vocabulary, "width": arguments.width, "pieces": pieces}
    result["environment"] = environment(Path())
    result["rows"] = [{"head": kind, "tokens": count, "different": found} for kind, count, found in rows]
    print(json.dumps(result))


def head_of(kind: str, vocabulary: int, width: int, tokens: int) -> Rows:
    """A random head of a kind, with the hidden states (1, tokens, width) that it is applied to."""
    dtype, bits = KINDS[kind]
    x = mx.random.normal((1, tokens, width)).astype(dtype)
    if not bits:
        weight = (mx.random.normal((vocabulary, width)) / width**0.5).astype(dtype)
        mx.eval(x, weight)
        return lambda first, last: x @ weight[first:last].T
    packed = mx.random.randint(0, 1 << 31, (vocabulary, width * bits // 32)).astype(mx.uint32)
    scales, biases = (mx.random.normal((vocabulary, width // GROUP_SIZE)) / width for _ in range(2))
    mx.eval(x, packed, scales, biases)

    def rows(first: int, last: int) -> mx.array:
        w, s, b = packed[first:last], scales[first:last], biases[first:last]
        return mx.quantized_matmul(x, w, s, b, transpose=True, group_size=GROUP_SIZE, bits=bits)

    return rows


def differences(head: Rows, vocabulary: int, pieces: list[int]) -> list[float]:
    """For each number of rows in a piece, the share of the logits whose bits differ from those of the whole head."""
    whole = _bits(head(0, vocabulary))
    shares = []
    for piece in pieces:
        parts = [head(first, min(first + piece, vocabulary)) for first in range(0, vocabulary, piece)]
        different: Any = mx.mean(whole != _bits(mx.concatenate(parts, axis=-1))).item()
        shares.append(float(different))
    return shares


def _bits(logits: mx.array) -> mx.array:
    return logits.view(mx.uint16 if logits.dtype.size == 2 else mx.uint32)


def _kinds(text: str) -> list[str]:
    kinds = text.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UsageError(f"--kinds has {unknown[0]!r:.80}, expected some of {', '.join(KINDS)}.")
    return kinds


def _numbers(text: str) -> list[int]:
    try:
        numbers: list[Any] = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UsageError(f"{text!r:.80} was given, expected positive numbers with commas between them.")
    return numbers
