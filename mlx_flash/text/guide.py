"""Steers an answer while it is generated: ends thoughts that are too long, and keeps the rest to a grammar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .answer_parts import CALL, HEADER, THOUGHT, AnswerParts

if TYPE_CHECKING:
    import mlx.core as mx


MOST_BREAKS = 2  # tokens of line breaks after the thoughts, where models write an empty line


class Guide:
    """A logits processor for one answer. `took` must be told of each chosen token, after `parts` was fed its text.

    parts: the parts of the answer. thinking_tokens: most tokens of its thoughts (None: no limit). grammar: for all that
    follows the thoughts (None: free). call_grammar: for the inside of a tool call, up to the end of its end marker,
    where `grammar` is not in force (None: free). may_think, may_call: whether the answer may begin with thoughts, or
    with a tool call, instead of what `grammar` allows. headers: grammars of the answer's first message with its header,
    and of a later one, for models whose calls are named in headers (None: free).
    """

    def __init__(
        self,
        parts: AnswerParts,
        *,
        thinking_tokens: int | None = None,
        grammar: Any = None,
        call_grammar: Any = None,
        may_think: bool = True,
        may_call: bool = False,
        headers: tuple[Any, Any] | None = None,
    ) -> None:
        self.headers = headers
        self.parts, self.thinking_tokens = parts, thinking_tokens
        self.grammar, self.call_grammar = grammar, call_grammar
        self.thought_tokens = 0  # number of tokens of the thoughts so far
        known = parts.format.tokenizer
        self._think = list(known.think_start_tokens or ()) if may_think and known.has_thinking else []
        start = list(known.tool_call_start_tokens or ()) if known.has_tool_calling else []
        self._call = start if may_call else []
        self._call_of_grammar = start if parts.tools and not may_call else []  # how a call in `grammar` begins
        self._forced: list[int] = []  # token ids that must come next
        self._kind = parts.kind
        self._constraint: Any = None
        self._nested = False  # whether the constraint is that of a tool call
        self._openers: list[list[int]] = []  # token ids that may come next, instead of what the grammar allows
        self._breaks = _line_breaks(known) if grammar is not None else frozenset[int]()
        self._breaks_left = 0  # number of line breaks that may come before what the grammar allows
        if self._kind == HEADER:
            self._constraint = headers[0].begin() if headers is not None else None
        elif self._kind != THOUGHT:
            self._begin_grammar()
        elif thinking_tokens == 0:
            self._forced = self._closing

    @property
    def active(self) -> bool:
        """Whether it may have to change logits."""
        steers = (self.thinking_tokens, self.grammar, self.call_grammar, self.headers)
        return any(each is not None for each in steers)

    @property
    def _closing(self) -> list[int]:
        """The token ids that end the thoughts."""
        closing = self.parts.format.closes_thoughts
        return closing if self.headers is None else closing[:1]  # The grammar of the next header knows how to go on.

    def __call__(self, _tokens: mx.array, logits: mx.array) -> mx.array:
        """Logits (1, V) -> logits (1, V), with -inf for the tokens that may not come next."""
        import mlx.core as mx

        if self._forced:
            masked, also = mx.full(logits.shape, -mx.inf, logits.dtype), self._forced[:1]
        elif self._constraint is not None:
            masked, also = self._constraint.mask(logits), [opener[0] for opener in self._openers]
            also += self._breaks if self._breaks_left else ()
        elif self._kind in (THOUGHT, HEADER) and (self.grammar is not None or self.headers is not None):
            return self._without_end(logits)
        else:
            return logits
        tokens = mx.arange(logits.shape[-1])
        for token in also:
            masked = mx.where(tokens == token, logits, masked)
        return masked

    def _without_end(self, logits: mx.array) -> mx.array:
        """Before what a grammar asks for: a token that ends the answer ends only the thoughts, and no header."""
        import mlx.core as mx

        ends, closing = sorted(self.parts.format.tokenizer.eos_token_ids), self.parts.format.closes_thoughts
        ends = [token for token in ends if token < logits.shape[-1]]
        if not ends or not closing:
            return logits
        wish = logits[:, mx.array(ends)].max()
        tokens = mx.arange(logits.shape[-1])
        for token in ends:
            logits = mx.where(tokens == token, -mx.inf, logits)
        if self._kind == HEADER:
            return logits
        return mx.where(tokens == closing[0], mx.maximum(logits, wish), logits)

    def took(self, token: int) -> None:
        """Follows a chosen token. Raises the errors of the grammar."""
        before, self._kind = self._kind, self.parts.kind
        if THOUGHT in (before, self._kind):
            self.thought_tokens += 1
        if self._forced:
            self._forced = self._forced[1:]
        elif opener := next((opener for opener in self._openers if opener[0] == token), None):
            self._constraint, self._forced = None, opener[1:]
        elif self._kind == THOUGHT and self.thinking_tokens is not None and self.thought_tokens >= self.thinking_tokens:
            self._forced = self._closing
        elif self._breaks_left and before == self._kind and token in self._breaks:
            self._breaks_left -= 1
            return
        elif self._constraint is not None and (self._kind != THOUGHT or before == HEADER):
            self._constraint.accept(token)
        self._openers, self._breaks_left = [], 0
        if self._kind == THOUGHT or (self._kind == HEADER and self.headers is None):
            self._constraint = None
        elif self._kind == HEADER and self.headers is not None:
            self._constraint = self._constraint if before == HEADER else self.headers[1].begin()
        elif before == HEADER and self.headers is not None:
            pass  # The header's grammar goes on inside the call.
        elif before in (THOUGHT, HEADER):
            if self._kind == CALL and self.parts.tools:
                self._begin_with_call()
            else:
                self._begin_grammar()
        elif before != self._kind and (self._constraint is None or self._nested):
            self._begin_nested()

    def _begin_grammar(self) -> None:
        """Begins what follows the thoughts."""
        self._nested = False
        if self.grammar is None:
            self._begin_nested()
            return
        self._constraint = self.grammar.begin()
        first = not self.thought_tokens
        self._breaks_left = 0 if first else MOST_BREAKS
        self._openers = [opener for opener in (self._think if first else [], self._call) if opener]

    def _begin_with_call(self) -> None:
        """Begins what follows the thoughts, inside a call: its start marker has ended them."""
        if self.grammar is None or not self._call_of_grammar:
            self._begin_nested()
            return
        self._nested, self._constraint = False, self.grammar.begin()
        for token in self._call_of_grammar:
            self._constraint.accept(token)

    def _begin_nested(self) -> None:
        """Begins or ends the inside of a tool call."""
        self._nested = self._kind == CALL and self.call_grammar is not None
        self._constraint = self.call_grammar.begin() if self._nested else None


def _line_breaks(tokenizer: Any) -> frozenset[int]:
    """The tokens that are one or two line breaks."""
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in ("\n", "\n\n")]
    return frozenset(int(ids[0]) for ids in encoded if len(ids) == 1)
