"""One answer while it is generated: its parts, and the probabilities of the tokens of its text."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..text.answer_parts import TEXT, THOUGHT, AnswerFormat, Part, Text
from ..text.guide import Guide
from ..text.sampling import Processor
from ..text.stops import StopWords
from .jobs import Job, Piece, Steering, Thought, TokenLogprob, ToolCall

if TYPE_CHECKING:
    from ..text.generation import FlashResponse


class AnswerInProgress:
    """Turns the responses of one generation into the items of its job."""

    def __init__(self, job: Job, tokenizer: Any, format: AnswerFormat) -> None:
        from .logprobs import LogprobReader

        self.job, self.tokenizer = job, tokenizer
        self.continues = job.ids if job.continues else []
        self.finish_reason: str | None = None
        self._parts: _WholeText | Any = _WholeText(job.stop)
        self._guide: Guide | None = None
        if (steering := job.steering) is not None:
            self._parts = format.begin(
                job.ids, tools=steering.tools, one_call=steering.one_call, stop=job.stop, continues=job.continues
            )
            self._guide = _guide(self._parts, steering)
        self._reader = None if job.top_logprobs is None else LogprobReader(tokenizer, self.continues)
        self._held: list[TokenLogprob] = []  # for tokens whose text has not been shown
        self._shown = 0  # number of characters of text, the echo of the prompt included
        self._text_end = 0  # index, in all that the model has said, of the end of the text so far

    @property
    def processors(self) -> list[Processor]:
        return [self._guide] if self._guide is not None and self._guide.active else []

    @property
    def thought_tokens(self) -> int:
        return self._guide.thought_tokens if self._guide is not None else 0

    @property
    def stop_word(self) -> str | None:
        return self._parts.stopped  # type: ignore[no-any-return]

    def begin_with(self, text: str) -> None:
        """Counts the echo of the prompt as shown."""
        self._shown = len(text)

    def take(self, response: FlashResponse) -> list[Thought | Piece | ToolCall]:
        """The items that are known after a response. The last one sets `finish_reason`."""
        parts, ends = self._parts, response.token in self.tokenizer.eos_token_ids
        if self._reader is not None and not ends:
            self._held.append(self._reader.read(response, self.job.top_logprobs or 0))
        found = parts.feed(response.text)
        if self._guide is not None and not ends:
            self._guide.took(response.token)
        reason = "stop" if parts.ended else response.finish_reason
        if reason is not None:
            found += parts.finish(whole=reason == "stop")
            self.finish_reason = "tool_calls" if parts.calls and reason == "stop" else reason
        items = [self._item(part) for part in found]
        if reason is not None and not parts.ended and self._text_end == parts.said and self._held:
            items.append(Piece("", self._told(None)))  # tokens without text of their own
        if parts.kind == THOUGHT:  # Nothing that was said until now becomes text. Thoughts may be long.
            self._held.clear()
        return items

    def _item(self, part: Part) -> Thought | Piece | ToolCall:
        if not isinstance(part, Text):
            return part
        self._told(part.start)  # Markers, thoughts and calls have no probabilities.
        entries = self._told(part.start + len(part.text))
        moved = part.start - self._shown
        self._shown += len(part.text)
        self._text_end = part.start + len(part.text)
        return Piece(part.text, tuple(replace(entry, offset=entry.offset - moved) for entry in entries))

    def _told(self, end: int | None) -> tuple[TokenLogprob, ...]:
        """Takes the probabilities of the tokens that begin before the character `end` (None: of all)."""
        count = len(self._held) if end is None else bisect_left(self._held, end, key=lambda entry: entry.offset)
        told, self._held = self._held[:count], self._held[count:]
        return tuple(told)


class _WholeText:
    """The parts of an answer that is one text, as those of text/answer_parts.py."""

    calls, kind = 0, TEXT

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = StopWords(stop)
        self._at = self.said = 0  # number of characters of the text, and of all that was said

    @property
    def stopped(self) -> str | None:
        return self._stop.found

    @property
    def ended(self) -> bool:
        return self.stopped is not None

    def feed(self, text: str) -> list[Part]:
        self.said += len(text)
        return self._shown(self._stop.feed(text))

    def finish(self, whole: bool) -> list[Part]:
        return self._shown(self._stop.finish())

    def _shown(self, text: str) -> list[Part]:
        self._at += len(text)
        return [Text(text, self._at - len(text))] if text else []


def _guide(parts: Any, steering: Steering) -> Guide:
    return Guide(
        parts,
        thinking_tokens=steering.thinking_tokens,
        grammar=steering.grammar,
        call_grammar=steering.call_grammar,
        may_think=steering.may_think,
        may_call=steering.may_call,
        headers=steering.headers,
    )
