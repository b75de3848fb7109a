"""What does structured output cost, and does it hold? Random answers to random JSON schemas, and the time per token."""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.cli.run import whole_number
from mlx_flash.errors import GrammarError, UsageError
from mlx_flash.flash.host_arrays import to_numpy
from mlx_flash.flash.system import current_memory_bytes
from mlx_flash.source.resolve import demo_folder
from mlx_flash.text.grammar import Constraint, Grammar, Grammars
from mlx_flash.text.token_bytes import token_bytes
from mlx_flash.text.tokenizer import load_tokenizer

from .tools.report import environment, spread

MOST_TOKENS = 2000  # of an answer
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object", "enum", "anyOf")
PATTERNS = ("^[a-z]{1,8}$", r"^\d{4}-\d{2}$", "x+", "^(yes|no)$", "[^a-z]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", type=Path, help="folder with a tokenizer (default: the packaged demo model's)")
    parser.add_argument(
        "--vocabulary", type=whole_number(1), help="number of logits (default: the size of the tokenizer's vocabulary)"
    )
    parser.add_argument(
        "--schemas", type=whole_number(1), default=1000, help="number of random schemas (default: %(default)s)"
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, help="(default: %(default)s)")


def main(arguments: argparse.Namespace) -> None:
    try:
        import jsonschema
    except ImportError:
        raise UsageError("this command needs jsonschema: pip install 'mlx-flash-runtime[bench]'.") from None

    folder = arguments.tokenizer or demo_folder()
    tokenizer = load_tokenizer(folder)
    vocabulary = arguments.vocabulary or max(tokenizer.get_vocab().values()) + 1
    grammars = Grammars(tokenizer, vocabulary)
    result: dict[str, Any] = {"command": "grammars", "vocabulary": vocabulary, **made(grammars)}
    walker = Walker(grammars)
    rng = random.Random(arguments.seed)
    counts = {"compiled": 0, "refused": 0, "ended": 0, "valid": 0}
    compile_ms: list[float] = []
    for _ in range(arguments.schemas):
        schema = random_schema(rng, 3)
        began = time.perf_counter()
        try:
            grammar = grammars.json_schema(schema)
        except GrammarError:
            counts["refused"] += 1
            continue
        compile_ms.append(1e3 * (time.perf_counter() - began))
        counts["compiled"] += 1
        text = walker.answer(grammar, rng)
        if text is None:
            continue
        counts["ended"] += 1
        try:
            jsonschema.validate(json.loads(text), schema)
            counts["valid"] += 1
        except Exception as error:
            print(f"NOT VALID: {json.dumps(schema)}: {text!r}: {error}")
    result |= {**counts, "compile_ms": spread(compile_ms), "mask_ms": spread(walker.mask_ms)}
    result["accept_ms"] = spread(walker.accept_ms)
    result["environment"] = environment(folder)
    show(result)
    print(json.dumps(result))


def made(grammars: Grammars) -> dict[str, float]:
    """Makes llguidance's vocabulary. Returns how long it took and by how much the process grew."""
    import llguidance.numpy  # noqa: F401  # not part of what is measured

    gc.collect()
    before, began = current_memory_bytes(), time.perf_counter()
    grammars.special_tokens()
    seconds = time.perf_counter() - began
    gc.collect()
    grown = current_memory_bytes() - before
    return {"vocabulary_seconds": seconds, "vocabulary_bytes": grown}


class Walker:
    """Answers of random tokens among those that are allowed, and the time that the grammar takes of each token."""

    def __init__(self, grammars: Grammars) -> None:
        self.grammars = grammars
        self.mask_ms: list[float] = []
        self.accept_ms: list[float] = []
        self.texts, _ = token_bytes(grammars.tokenizer, grammars.vocabulary)
        # Without a preference for tokens that end something, strings hardly ever end.
        self.closing = np.array([bool(text) and text[:1] in b'"}]' for text in self.texts])
        self.logits = mx.zeros((1, grammars.vocabulary))

    def answer(self, grammar: Grammar, rng: random.Random) -> str | None:
        """The text of an answer; None if it did not end."""
        constraint, text = grammar.begin(), b""
        for count in range(MOST_TOKENS):
            token = self.choose(constraint, rng, count)
            began = time.perf_counter()
            constraint.accept(token)
            self.accept_ms.append(1e3 * (time.perf_counter() - began))
            if token in self.grammars.eos:
                return text.decode()
            text += self.texts[token]
        return None

    def choose(self, constraint: Constraint, rng: random.Random, count: int) -> int:
        began = time.perf_counter()
        masked = constraint.mask(self.logits)
        mx.eval(masked)
        self.mask_ms.append(1e3 * (time.perf_counter() - began))
        allowed = to_numpy(masked)[0] == 0
        closing = allowed & self.closing if rng.random() < 0.2 + count / 500 else allowed
        return int(rng.choice(np.flatnonzero(closing if closing.any() else allowed)))


def random_schema(rng: random.Random, depth: int) -> dict[str, Any]:
    kind = rng.choice(TYPES if depth else TYPES[:5])
    schema: dict[str, Any] = {"type": kind}
    low = rng.randint(-100, 100)
    if kind in ("integer", "number") and rng.random() < 0.5:
        schema |= {"minimum": low, rng.choice(["maximum", "exclusiveMaximum"]): low + rng.randint(1, 1000)}
    elif kind == "integer" and rng.random() < 0.3:
        schema["multipleOf"] = rng.randint(2, 12)
    elif kind == "string":
        least = rng.randint(0, 5)
        ways: list[dict[str, Any]] = [
            {},
            {"minLength": least, "maxLength": least + rng.randint(0, 20)},
            {"pattern": rng.choice(PATTERNS)},
        ]
        schema |= rng.choice([*ways, {"format": rng.choice(("date", "time", "uuid", "ipv4", "email"))}])
    elif kind == "array":
        least = rng.randint(0, 2)
        schema |= {"items": random_schema(rng, depth - 1), "minItems": least, "maxItems": least + rng.randint(0, 3)}
    elif kind == "object":
        names = rng.sample(["a", "b", "name", "é", 'a "word"', "x/y", "n\nl"], rng.randint(0, 4))
        schema["properties"] = {name: random_schema(rng, depth - 1) for name in names}
        schema["required"] = [name for name in names if rng.random() < 0.5]
        schema["additionalProperties"] = rng.choice([False, False, True, random_schema(rng, 0)])
    elif kind == "enum":
        return {"enum": rng.sample([None, True, 0, -7, 2.5, "", "é\n", 'q"', [1, [2]], {"k": {"l": "m"}}], 3)}
    elif kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    return schema


def show(result: dict[str, Any]) -> None:
    print(f"vocabulary of {result['vocabulary']} tokens: {result['vocabulary_seconds']:.2f} s, ", end="")
    print(f"{result['vocabulary_bytes'] / 1e6:.1f} MB")
    counted = ", ".join(f"{result[name]} {name}" for name in ("compiled", "refused", "ended", "valid"))
    print(f"schemas: {counted}")
    for name in ("compile_ms", "mask_ms", "accept_ms"):
        times = result[name]
        print(f"{name:<12}" + "  ".join(f"{key} {value:.3f}" for key, value in times.items()))
