"""Answers of random tokens that a grammar allows: JSON fits its schema, and what cannot be enforced has an error."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import threading
import time
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from grammar_walks import Walks, allowed_ids  # type: ignore[import-not-found]  # found beside this file
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import made  # type: ignore[import-not-found]

from mlx_flash.errors import GrammarError
from mlx_flash.text.grammar import LIMITS, Grammars
from mlx_flash.text.token_bytes import token_bytes

BYTE_LEVEL = "byte-level"
CONSTRAINED = (
    BYTE_LEVEL,
    "byte-level with sentencepiece's decoder",
    "vocab.json and merges.txt",
    "byte fallback",
    "byte fallback, Metaspace",
    "a gap in the vocabulary",
    "Unigram with bytes",
    "sentencepiece BPE",
    "sentencepiece Unigram",
    "sentencepiece's own BPE",
    "sentencepiece's own Unigram",
)
REFUSED = ("WordPiece", "WordLevel", "CTC", "BPE with suffixes", "Unigram, cleaned up", "bytes (ByT5)")
PERSON = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "A person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8, "description": "in full"},
        "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 150},
        "kind": {"enum": ["a", "é\n", 1.5, None, True, {"x": [1]}]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,4}$"}, "maxItems": 3},
        "friends": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1, "default": []},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": PERSON,
    "any": {},
    "number": {"type": "number", "minimum": -2.5, "maximum": 7},
    "multiple": {"type": "integer", "multipleOf": 7},
    "const": {"const": {"a": [1, "x", None]}},
    "format": {"type": "string", "format": "date"},
    "union": {"type": ["string", "null", "integer"], "maxLength": 3},
    "anyOf": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/pair"}], "$defs": {"pair": {"prefixItems": [{}]}}},
    "allOf": {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}}, {"required": ["a"]}]},
    "tuple": {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "null"}, "minItems": 2},
    "old tuple": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [{"type": "integer"}],
        "additionalItems": {"type": "null"},
    },
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 1, "maxProperties": 3},
    "patterns": {
        "type": "object",
        "properties": {"a": {"type": "null"}},
        "patternProperties": {"^x": {"type": "integer"}},
        "additionalProperties": {"type": "boolean"},
    },
    "large bounds": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
}


@functools.cache
def walks(kind: str = BYTE_LEVEL, more: int = 0) -> Walks:
    return Walks(made(kind), more)


def check(schema: dict[str, Any], seeds: range, of: Walks) -> int:
    """Checks the answers of some walks against the schema. Returns how many answers ended."""
    grammar = of.grammars.json_schema(schema)
    texts = [text for seed in seeds if (text := of.text(grammar, seed)) is not None]
    for text in texts:
        jsonschema.validate(json.loads(text), schema)
        assert not re.match(r"\s", text)
    return len(texts)


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_fit_their_schema(name: str) -> None:
    assert check(SCHEMAS[name], range(8), walks()) >= 6


@pytest.mark.parametrize("kind", CONSTRAINED)
def test_every_kind_of_tokenizer(kind: str) -> None:
    assert check(PERSON, range(3), walks(kind)) >= 2
    texts, special = token_bytes(made(kind), walks(kind).vocabulary)
    assert {made(kind).convert_tokens_to_ids("</s>")} <= special
    grammar = walks(kind).grammars.lark("start: /[a-zA-Z ]{1,6}(<unk>|é)+/")
    for seed in range(4):
        tokens = walks(kind).tokens(grammar, seed)
        assert tokens is not None
        written = b"".join(texts[token] for token in tokens).decode()
        # decode leaves out the first space of sentencepiece's texts.
        assert made(kind).decode(tokens, clean_up_tokenization_spaces=False) in (written, written[1:])
        assert re.fullmatch(r"[a-zA-Z ]{1,6}(<unk>|é)+", written) and not special & set(tokens)


@pytest.mark.parametrize("kind", REFUSED)
def test_tokenizers_that_cannot_be_constrained(kind: str) -> None:
    with pytest.raises(GrammarError, match=r"cannot be held to a grammar: its tokenizer .* Ask for plain text"):
        walks(kind).grammars.json_object()


def test_a_tokenizer_without_brackets() -> None:
    with pytest.raises(GrammarError, match="no token of this model can begin"):
        walks("Unigram").grammars.json_object()


NAMES = st.sampled_from(["a", "b", "name", "é", "x y", 'q"', "n\nl", "$ref"])
LEAVES = st.one_of(
    st.just({}),
    st.sampled_from([{"type": name} for name in ("null", "boolean", "integer", "number")]),
    st.builds(lambda a, b: {"type": "string", "minLength": a, "maxLength": a + b}, *[st.integers(0, 5)] * 2),
    st.builds(
        lambda a, b: {"type": "integer", "minimum": a, "maximum": a + b}, st.integers(-99, 99), st.integers(0, 50)
    ),
    st.builds(
        lambda a, b: {"type": "number", "exclusiveMinimum": a, "maximum": a + b},
        st.floats(-99, 99, width=16),
        st.integers(1, 50),
    ),
    st.builds(
        lambda values: {"enum": values}, st.lists(st.text(max_size=4) | st.integers(-9, 9), min_size=1, max_size=4)
    ),
    st.sampled_from([{"type": "string", "pattern": pattern} for pattern in ("^a|b$", "x+", r"^\d{2}$", "[^a-z]")]),
    st.sampled_from([{"type": "string", "format": name} for name in ("uuid", "ipv4", "date-time", "email")]),
)


def grown(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def thing(properties: dict[str, Any], required: int, more: Any) -> dict[str, Any]:
        names = list(properties)[:required]
        return {"type": "object", "properties": properties, "required": names, "additionalProperties": more}

    properties = st.dictionaries(NAMES, inner, max_size=3)
    return st.one_of(
        st.builds(thing, properties, st.integers(0, 3), st.booleans() | inner),
        st.builds(lambda items, n: {"type": "array", "items": items, "maxItems": n}, inner, st.integers(0, 3)),
        st.builds(lambda ways: {"anyOf": ways}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            lambda items: {"prefixItems": items, "items": False, "type": "array"},
            st.lists(inner, min_size=1, max_size=3),
        ),
    )


MADE_UP = st.recursive(LEAVES, grown, max_leaves=6)


@settings(max_examples=70)
@given(MADE_UP, st.integers(0, 1000))
def test_answers_fit_made_up_schemas(schema: dict[str, Any], seed: int) -> None:
    check(schema, range(seed, seed + 2), walks())


# -- where an answer ends ------------------------------------------------------------------------------------


def test_every_end_token_ends_an_answer_and_none_comes_early() -> None:
    tokenizer = made(BYTE_LEVEL)
    ends = {tokenizer.convert_tokens_to_ids(name) for name in ("</s>", "<|im_end|>")}
    of = Walks(tokenizer, more=50, eos_token_ids=sorted(ends))
    constraint = of.grammars.regex("ab?").begin()
    assert not ends & set(allowed_ids(constraint)) and not constraint.can_end
    constraint.accept(tokenizer.convert_tokens_to_ids("a"))
    assert constraint.can_end and not constraint.ended
    assert set(allowed_ids(constraint)) == {*ends, tokenizer.convert_tokens_to_ids("b")}
    other = of.grammars.regex("ab?").begin()  # Another answer begins anew.
    assert not other.can_end
    constraint.accept(tokenizer.convert_tokens_to_ids("b"))
    assert constraint.ended and set(allowed_ids(constraint)) == ends
    with pytest.raises(GrammarError, match="cannot follow"):
        constraint.accept(tokenizer.convert_tokens_to_ids("b"))
    for end in ends:
        constraint = of.grammars.regex("b*").begin()
        constraint.accept(end)
        assert constraint.ended and set(allowed_ids(constraint)) == ends
        with pytest.raises(GrammarError, match="after the end"):
            constraint.accept(tokenizer.convert_tokens_to_ids("b"))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_logits_beyond_the_tokenizer_are_never_allowed(dtype: mx.Dtype) -> None:
    of = walks(more=77)
    ids = allowed_ids(of.grammars.regex("(?s:.+)").begin(), dtype)
    assert ids and max(ids) < of.vocabulary - 77
    with pytest.raises(ValueError, match=r"expected logits \(1, "):
        of.grammars.regex("a").begin().mask(mx.zeros((1, 5)))


def test_a_token_that_is_not_allowed_is_an_error() -> None:
    constraint = walks().grammars.json_object().begin()
    with pytest.raises(GrammarError, match="cannot"):
        constraint.accept(made(BYTE_LEVEL).convert_tokens_to_ids("a"))
    with pytest.raises(GrammarError, match="cannot be continued"):
        constraint.allowed()


def test_an_answer_that_becomes_too_complex_does_not_harm_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIMITS, "max_lexer_states", 500)
    grammar = walks().grammars.regex("(.*a.{20}){10}")
    letters = [made(BYTE_LEVEL).convert_tokens_to_ids(letter) for letter in "ab"]
    for _ in range(2):
        constraint, rng = grammar.begin(), np.random.default_rng(0)
        constraint.accept(letters[0])
        with pytest.raises(GrammarError, match="cannot be continued in its grammar: lexer error: too many states"):
            for token in rng.choice(letters, 5000):
                constraint.allowed()
                constraint.accept(int(token))


def test_a_tokenizer_without_an_end() -> None:
    grammars = Grammars(made("words in pieces (CTRL)"), 8)
    with pytest.raises(GrammarError, match="no token that ends a text"):
        grammars.json_object()


def test_json_has_no_free_whitespace() -> None:
    of = walks()
    constraint = of.grammars.json_object().begin()
    texts, _ = token_bytes(made(BYTE_LEVEL), of.vocabulary)
    for character in '{"a": ':
        constraint.accept(texts.index(character.encode()))
    assert not any(texts[token][:1].isspace() for token in allowed_ids(constraint))
    dumped = json.dumps({"a": [1, 2.5, "x y"], "b": {"c": None}})
    for text in (dumped, dumped.replace(": ", ":").replace(", ", ",")):
        constraint = of.grammars.json_object().begin()
        for token in made(BYTE_LEVEL).encode(text, add_special_tokens=False):
            constraint.accept(token)
        assert constraint.ended


# -- what cannot be used -------------------------------------------------------------------------------------

NOT_ENFORCED: dict[str, Any] = {
    "not": {},
    "if": {},
    "contains": {},
    "uniqueItems": True,
    "dependentRequired": {},
    "propertyNames": {},
    "unevaluatedProperties": False,
    "nullable": True,
    "minlength": 3,
    "x-guidance": {"lenient": True},
    "$dynamicRef": "#a",
    "format": "phone",
    "$ref": "https://example.com/schema",
    "multipleOf": 0,
    "minLength": 10**9,
    "minProperties": 2,
    "pattern": "(?=a)b",
    "type": "float",
    "enum": [],
    "const": 2**53 + 1,
    "required": "a",
    "maximum": "3",
    "exclusiveMinimum": True,
    "anyOf": [],
    "additionalItems": False,
}


@pytest.mark.parametrize("keyword", NOT_ENFORCED)
def test_no_keyword_is_ignored(keyword: str) -> None:
    schema = {"type": "object", "properties": {"a": {keyword: NOT_ENFORCED[keyword]}}}
    said = {"format": "Unknown format: phone", "pattern": "look-around"}.get(keyword, re.escape(repr(keyword)))
    with pytest.raises(GrammarError, match=said):
        walks().grammars.json_schema(schema)


def test_annotations_have_no_effect() -> None:
    notes = {"title": "t", "$id": "https://example.com/a", "$comment": "c", "deprecated": True, "uniqueItems": False}
    assert check({**notes, "type": "integer", "examples": [{"not": 1}]}, range(2), walks()) == 2


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable"),
        ({"$ref": "#"}, "no token of this model can begin"),
        ({"$ref": "#/$defs/none"}, "where no schema is"),
        ({"const": 1, "$ref": "#/const"}, "where no schema is"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ([], "is a list, expected an object"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"enum": ["\ud800"]}, "surrogate"),
    ],
)
def test_invalid_schemas(schema: Any, said: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(said)):
        walks().grammars.json_schema(schema)


def test_invalid_texts() -> None:
    grammars = walks().grammars
    for text, said in (("(a", "unclosed group"), (r"\ba", "lookarounds"), ("", "is empty")):
        with pytest.raises(GrammarError, match=f"the regular expression .*{said}"):
            grammars.regex(text)
    for text, said in (("start: other", 'unknown name: "other"'), ("start: 'a", "lexer error"), ('x: "a"', "start")):
        with pytest.raises(GrammarError, match=f"the Lark grammar .*{said}"):
            grammars.lark(text)


def nested(depth: int, keyword: str) -> Any:
    schema: Any = {}
    for _ in range(depth):
        schema = {keyword: [schema] if keyword == "allOf" else schema}
    return schema


def references(count: int) -> dict[str, Any]:
    """Definitions that lead to each other, each one twice."""
    two = {f"d{i}": {"allOf": [{"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"maxLength": i}]}] * 2} for i in range(count)}
    return {"$defs": {**two, f"d{count}": {}}, "$ref": "#/$defs/d0"}


def choices(count: int) -> dict[str, Any]:
    """Choices between two objects, all of which must be made."""
    ways = [{"type": "object", "properties": {name: {"type": "string"}}} for name in "ab"]
    return {"allOf": [{"anyOf": ways}] * count}


def ambiguous(count: int) -> list[str]:
    return [f"(a|b)*a(a|b){{{i}}}" for i in range(count)]


HOSTILE = {
    "deep items": lambda of: of.json_schema(nested(100_000, "items")),
    "deep allOf": lambda of: of.json_schema(nested(23, "allOf")),
    "deep const": lambda of: of.json_schema({"const": nested(100_000, "a")}),
    "references": lambda of: of.json_schema(references(300)),
    "a chain": lambda of: of.json_schema({"$defs": {f"{i}": {"$ref": f"#/$defs/{i + 1}"} for i in range(900)}}),
    "many properties": lambda of: of.json_schema({"properties": {f"p{i}": {} for i in range(100_000)}}),
    "1000 properties": lambda of: of.json_schema({"type": "object", "properties": {f"p{i}": {} for i in range(1000)}}),
    "long enum": lambda of: of.json_schema({"enum": [f"{i * 7919}" for i in range(9000)]}),
    "long text": lambda of: of.json_schema({"const": "x" * 10**6}),
    "divisors": lambda of: of.json_schema({"allOf": [{"multipleOf": n} for n in (9973, 9967, 9949)]}),
    "repeated pattern": lambda of: of.json_schema({"pattern": "^(((a{1,1000}){1,1000}){1,1000})$"}),
    "optional letters": lambda of: of.json_schema({"pattern": "a?" * 1000 + "b"}),
    "states": lambda of: of.regex("(.*a.{20}){10}"),
    "ambiguous": lambda of: of.regex("(a|aa)+" * 60 + "b"),
    "long": lambda of: of.regex("a?" * 100_000),
    "deep": lambda of: of.regex("(" * 1000 + ")" * 1000),
    "deep Lark": lambda of: of.lark("start: " + "(" * 10**5 + ")" * 10**5),
    "rules": lambda of: of.lark("start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1}' for i in range(800)) + '\nr800: "b"'),
    "repeated rules": lambda of: of.lark('start: ("a"{1000000}){1000000}'),
    "a used chain": lambda of: of.json_schema(
        {"$defs": {f"{i}": {"$ref": f"#/$defs/{i + 1}"} for i in range(900)} | {"900": {}}, "$ref": "#/$defs/0"}
    ),
    "8 choices": lambda of: of.json_schema(choices(8)),
    "20 choices": lambda of: of.json_schema(choices(20)),
    "8 patterns": lambda of: of.json_schema({"allOf": [{"pattern": each} for each in ambiguous(8)]}),
    "20 patterns": lambda of: of.json_schema({"allOf": [{"pattern": each} for each in ambiguous(20)]}),
    "13 terms": lambda of: of.lark("start: A\nA: /" + "/ & /".join(ambiguous(13)) + "/"),
    "20 terms": lambda of: of.lark("start: A\nA: /" + "/ & /".join(ambiguous(20)) + "/"),
    "negations": lambda of: of.lark("start: A\nA: /(?s:.*)/ & ~(/(?s:.*)a.{12}b(?s:.*)/ & ~/(?s:.*)c.{12}d(?s:.*)/)"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_bounded(name: str) -> None:
    """They compile or have an error, within seconds, in a thread with the smallest stack that macOS gives."""
    grammars = walks().grammars
    grammars.json_object()
    failed: list[BaseException] = []

    def use() -> None:
        try:
            constraint = HOSTILE[name](grammars).begin()
            rng = np.random.default_rng(0)
            for _ in range(100):
                token = int(rng.choice(np.flatnonzero(constraint.allowed())))
                constraint.accept(token)
                if constraint.ended:
                    return
        except GrammarError as error:
            assert len(str(error)) < 600
        except BaseException as error:
            failed.append(error)

    before = threading.stack_size(512 << 10)
    thread = threading.Thread(target=use)
    began = time.perf_counter()
    thread.start()
    threading.stack_size(before)
    thread.join()
    assert not failed and time.perf_counter() - began < 5


def test_the_library_is_imported_only_when_it_is_used() -> None:
    code = "import sys, mlx_flash.text.grammar, mlx_flash.text.tool_grammar; assert 'llguidance' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_measuring_command(capsys: pytest.CaptureFixture[str]) -> None:
    from mlx_flash.bench.__main__ import make_parser

    arguments = make_parser().parse_args(["grammars", "--schemas", "6"])
    arguments.run(arguments)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["compiled"] == 6 and result["ended"] == result["valid"] > 3
    assert result["mask_ms"]["median"] > 0 and result["vocabulary"] == 4096
