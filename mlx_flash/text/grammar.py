"""Structured output: holds an answer to a JSON schema, a Lark grammar or a regular expression, token by token.

`Grammars` belongs to a loaded model and compiles grammars. A `Grammar` can be used for many answers. Each answer has
its own `Constraint`, which sets the logits of all tokens that cannot follow to -inf. llguidance does the parsing.

llguidance's own functions for MLX run a Metal kernel, so they fail on other backends. Here it fills a bit mask of
NumPy, and `mx.where` applies it everywhere.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import GrammarError
from .json_schema import checked_schema
from .token_bytes import token_bytes

if TYPE_CHECKING:
    import mlx.core as mx

MOST_CHARACTERS = {"the Lark grammar": 1 << 14, "the regular expression": 1 << 12}
MOST_BRACKETS = 64  # open at once in either
MOST_INTERSECTIONS = 12  # uses of & in a Lark grammar; the work may double with each, and with 12 it takes 0.4 s
# llguidance compiles recursively: a thousand rules that lead to each other fill the 8 MB of Linux's first thread, and a
# full stack ends the process. Only the pages that are used take memory.
COMPILE_STACK_BYTES = 128 << 20
# The work that one grammar, and one token of an answer, may take. llguidance's own limits allow a lexer of 500 MB.
LIMITS = {
    "initial_lexer_fuel": 1_000_000,  # about 20 ms
    "step_lexer_fuel": 200_000,  # about 15 ms
    "step_max_items": 50_000,
    "max_items_in_row": 2000,
    "max_lexer_states": 20_000,  # 1 to 2 KB each
    "max_grammar_size": 200_000,
    "precompute_large_lexemes": False,  # It fails for long texts of tool calls, and saves a few ms per answer.
    "verbose_errors": False,  # Long messages repeat the grammar and the state of the parser.
}
# JSON on one line, as json.dumps writes it with or without spaces. With free whitespace a small model writes newlines
# until the limit of tokens, because after each one another is still allowed. Indented JSON would need whitespace whose
# length depends on the depth.
JSON_STYLE = {"item_separator": ", ?", "key_separator": ": ?", "whitespace_flexible": False}
_STACK_SIZE = threading.Lock()  # The size of new threads' stacks is a setting of the process.
FINISHED = ("NoExtension", "NoExtensionBias", "EndOfSentence")  # reasons to stop that are not errors


class Grammars:
    """Compiles grammars for one model. Its methods may be called from several threads.

    tokenizer: mlx-lm's TokenizerWrapper, or a tokenizer of transformers. vocabulary: the number of logits, V, which may
    be larger than the tokenizer's vocabulary. Tokens that the tokenizer does not know are never allowed.

    Every method raises GrammarError for a grammar that cannot be used, with what was found in it, and for a model whose
    tokenizer cannot be constrained. The first call takes about 0.3 s more, for the vocabulary.
    """

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self.tokenizer, self.vocabulary = tokenizer, vocabulary
        ids = getattr(tokenizer, "eos_token_ids", None) or [tokenizer.eos_token_id]
        ids = [ids] if isinstance(ids, int) else ids  # transformers' own
        self.eos = frozenset(number for number in ids if number is not None and 0 <= number < vocabulary)
        self._lock = threading.Lock()
        self._made: tuple[Any, dict[str, int]] | None = None

    def json_object(self) -> Grammar:
        """One JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: dict[str, Any]) -> Grammar:
        """JSON that the schema (draft 2020-12) describes. Properties come in the schema's order.

        Raises GrammarError, which names the keyword, for one that cannot be enforced. Annotations have no effect.
        """
        return self.lark(f"start: {json_rule(checked_schema(schema))}", "the JSON schema")

    def regex(self, text: str) -> Grammar:
        """Text that the regular expression matches as a whole. The syntax is that of Rust's regex crate."""
        from llguidance import regex_to_lark

        if not text:  # // begins a comment in Lark.
            raise GrammarError("the regular expression is empty, expected one that matches some text.")
        _check_text(text, "the regular expression")
        return self.lark(f"start: /{regex_to_lark(text, use_ascii='')}/", "the regular expression")

    def lark(self, text: str, what: str = "the Lark grammar") -> Grammar:
        """Text of the grammar's rule `start`, in llguidance's variant of Lark. what: its name in messages.

        llguidance itself reads a schema after `%json` in the text. It ignores keywords that it does not know.
        """
        if what in MOST_CHARACTERS:
            _check_text(text, what)
            if "Lark" in what and (found := text.count("&")) > MOST_INTERSECTIONS:
                raise GrammarError(f"{what} has {found} of the character &, expected at most {MOST_INTERSECTIONS}.")
        grammar = Grammar(self._vocabulary()[0], text, self.vocabulary, self.eos)
        constraint = grammar.begin()
        if problem := constraint.problem():
            raise GrammarError(f"{what} cannot be used: {problem}")
        try:
            constraint.allowed()  # Some errors appear only with the first token.
        except GrammarError as error:
            raise GrammarError(f"{what} cannot be used: no token of this model can begin its text ({error})") from None
        grammar.ready.append(constraint)
        return grammar

    def special_tokens(self) -> dict[str, int]:
        """The name and id of every special token, such as {"<tool_call>": 151657}."""
        return self._vocabulary()[1]

    def _vocabulary(self) -> tuple[Any, dict[str, int]]:
        """llguidance's tokenizer and the special tokens, made once."""
        with self._lock:
            if self._made is None:
                from llguidance import LLTokenizer

                if not self.eos:
                    raise GrammarError(
                        "this model's answers cannot be held to a grammar: its tokenizer has no token that ends a "
                        "text. Set eos_token_id in the model's config.json."
                    )
                texts, special = token_bytes(self.tokenizer, self.vocabulary)
                source = _Vocabulary(texts, special | self.eos, self.eos)
                made = LLTokenizer(source, eos_token=sorted(self.eos))
                source.tokens = []  # llguidance keeps the object, and has copied these.
                self._made = made, {texts[number].decode(): number for number in sorted(special)}
            return self._made


class Grammar:
    """A grammar that has been checked. `begin` may be called from several threads."""

    def __init__(self, tokens: Any, text: str, vocabulary: int, eos: frozenset[int]) -> None:
        from llguidance import LLMatcher

        # With forcing, llguidance would ask the tokenizer how it splits text of which there is only one. Without, the
        # model chooses among all the ways to write it.
        self._compiled = LLMatcher.grammar_from_lark(text + '\n%llguidance {"no_forcing": true}\n')
        self._tokens, self._vocabulary, self._eos = tokens, vocabulary, eos
        self.ready: list[Constraint] = []  # begun while the grammar was checked

    def begin(self) -> Constraint:
        """The constraint for one answer, at its beginning. It takes some milliseconds.

        Every answer compiles the grammar anew. Copies of one matcher share the states of its lexer, so one answer could
        use up the limit of all later ones, and they would wait for each other.
        """
        from llguidance import LLMatcher, LLParserLimits

        try:
            return self.ready.pop()
        except IndexError:
            limits = LLParserLimits(**LIMITS)
            matcher = _with_large_stack(lambda: LLMatcher(self._tokens, self._compiled, log_level=0, limits=limits))
            return Constraint(matcher, self._vocabulary, self._eos)


class Constraint:
    """Holds one answer to a grammar: `mask`, choose a token, `accept` it, and so on. Not for several threads.

    Raises GrammarError if the grammar becomes too complex in the middle of an answer.
    """

    def __init__(self, matcher: Any, vocabulary: int, eos: frozenset[int]) -> None:
        self._matcher, self._vocabulary, self._eos = matcher, vocabulary, eos
        self._words = np.zeros((1, -(-vocabulary // 32)), np.int32)
        self._end_said = False

    def mask(self, logits: mx.array) -> mx.array:
        """Sets what cannot follow to -inf. (1, V) -> (1, V), same dtype.

        Tokens that end a text are allowed where the grammar may end, and once it has ended, only they are.
        """
        import mlx.core as mx

        if logits.shape != (1, self._vocabulary):
            raise ValueError(f"expected logits (1, {self._vocabulary}) but received {logits.shape}")
        return mx.where(mx.array(self.allowed()), logits, mx.array(-float("inf"), logits.dtype))

    def allowed(self) -> np.ndarray:
        """Whether each token may follow: bool (V,). At least one may."""
        from llguidance.numpy import fill_next_token_bitmask

        if self._end_said:
            allowed = np.zeros(self._vocabulary, bool)
            allowed[list(self._eos)] = True
            return allowed
        fill_next_token_bitmask(self._matcher, self._words)
        self._check()
        bits = np.unpackbits(self._words.view(np.uint8)[0], count=self._vocabulary, bitorder="little")
        if not bits.any():
            raise GrammarError("the answer cannot be continued: no token of this model can follow in its grammar.")
        return bits.view(bool)

    def accept(self, token: int) -> None:
        """Continues with the token that was chosen. Raises GrammarError for one that is not allowed."""
        if self._end_said or (token in self._eos and self.can_end):
            if token not in self._eos:
                raise GrammarError(f"token {token} was chosen after the end of the grammar.")
            self._end_said = True
        elif self.ended or not self._matcher.consume_token(token):
            self._check()
            raise GrammarError(f"token {token} cannot follow in the grammar of this answer.")
        self._check()

    @property
    def ended(self) -> bool:
        """Whether the grammar has ended: only a token that ends the text is allowed."""
        return self._end_said or bool(self._matcher.is_stopped() and self._matcher.stop_reason() in FINISHED)

    @property
    def can_end(self) -> bool:
        """Whether the answer may end here."""
        return self.ended or bool(self._matcher.is_accepting())

    def problem(self) -> str:
        """What is wrong with the grammar or with the answer so far, as a sentence; "" if nothing is."""
        reason = self._matcher.stop_reason()
        if self._matcher.is_error() or (reason != "NotStopped" and reason not in FINISHED):
            return _said(self._matcher.get_error() or reason)
        return ""

    def _check(self) -> None:
        # The matcher only logs its errors, and then allows the end of the text, after half an answer.
        if problem := self.problem():
            raise GrammarError(f"the answer cannot be continued in its grammar: {problem} Use a simpler grammar.")


class _Vocabulary:
    """What llguidance asks of a tokenizer.

    Its own reader for Hugging Face's tokenizers keeps a second copy of the tokenizer (51 MB for 49,152 tokens), fails
    for vocabularies with gaps, and does not know sentencepiece's.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: frozenset[int] | set[int], eos: frozenset[int]) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, sorted(special), min(eos)

    def __call__(self, text: bytes) -> list[int]:
        raise NotImplementedError  # not called without forcing


def json_rule(schema: dict[str, Any]) -> str:
    """A checked schema as a Lark expression."""
    return f"%json {json.dumps({**schema, 'x-guidance': JSON_STYLE})}"


def _check_text(text: str, what: str) -> None:
    if len(text) > MOST_CHARACTERS[what]:
        raise GrammarError(f"{what} has {len(text)} characters, expected at most {MOST_CHARACTERS[what]}. Simplify it.")
    depth = 0
    for character in text:
        depth = max(0, depth + (character in "([{") - (character in ")]}"))
        if depth > MOST_BRACKETS:
            raise GrammarError(f"{what} opens more than {MOST_BRACKETS} brackets at once. Nest it less deeply.")


def _with_large_stack(compile: Callable[[], Any]) -> Any:
    """The result of `compile`, called in a thread of its own."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(compile())
        except BaseException as error:
            result.set_exception(error)

    with _STACK_SIZE:
        before = threading.stack_size(COMPILE_STACK_BYTES)
        try:
            threading.Thread(target=run, name="compile-grammar", daemon=True).start()
        finally:
            threading.stack_size(before)
    return result.result()


def _said(message: str) -> str:
    """llguidance's message as one sentence: without places in our own text, and with the reason of a regex error."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or [""]
    text = lines[0].removeprefix("failed to compile JSON schema: ")
    text = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", text)
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    text = " ".join([text, *reasons])[:300]
    return text if text.endswith(".") else text + "."
