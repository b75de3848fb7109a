"""OpenAI's text completions: /v1/completions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ...text.answer_parts import Thought, ToolCall
from ..api_errors import ApiError
from ..jobs import End, Piece, TokenLogprob
from .answer_form import Answered, event
from .openai_common import OpenAiForm, OpenAiRequest, Tokens, Whole, by_text, count_or_off, usage_of
from .question import Question, Sampling

MOST_PROMPTS = 64  # in one request


class CompletionRequest(OpenAiRequest):
    prompt: str | list[Any]  # a text or token ids, or a list with one of these
    max_tokens: Tokens | None = 16
    logprobs: Annotated[Annotated[int, Field(ge=0, le=5)] | None, BeforeValidator(count_or_off)] = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Whole | None = None

    @property
    def top(self) -> int | None:
        return self.logprobs

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            message = "max_tokens is 0, expected at least 1, or -1 for as many as fit. Only an echo may have 0."
            raise ApiError(400, message, param="max_tokens")
        if self.suffix:
            raise ApiError(400, "suffix is not supported: these models only continue a text.", param="suffix")
        if self.best_of not in (None, self.n or 1):
            raise ApiError(400, f"best_of is {self.best_of}, expected the same as n.", param="best_of")
        if self.response_format is not None and self.response_format.get("type") != "text":
            message = "response_format is for chats; here it can only be {'type': 'text'}."
            raise ApiError(400, message, param="response_format")

    def question(self, sampling: Sampling) -> Question:
        """What the request asks. Raises ApiError."""
        return Question(self.prompts(), self.asked, sampling, self.stops(), self.top, self.n or 1, echo=bool(self.echo))

    def prompts(self) -> list[str | list[int]]:
        """Each prompt. Raises ApiError for one that is neither a text nor token ids."""
        given: Any = self.prompt
        several = isinstance(given, list) and bool(given) and type(given[0]) is not int
        prompts: list[Any] = given if several else [given]
        if len(prompts) > MOST_PROMPTS:
            message = (
                f"prompt has {len(prompts)} parts, expected at most {MOST_PROMPTS}. Send them in several requests."
            )
            raise ApiError(400, message, param="prompt")
        for each in prompts:
            if not isinstance(each, str) and not (isinstance(each, list) and all(type(i) is int for i in each)):
                raise ApiError(400, "prompt is neither a text nor a list of token ids.", param="prompt")
        return prompts


class CompletionForm(OpenAiForm):
    kind = "text_completion"

    def __init__(self, request: CompletionRequest, model: str) -> None:
        super().__init__("cmpl", request, model)

    def whole(self, answers: list[Answered]) -> dict[str, Any]:
        choices = [
            self._choice(index, answered.text, answered.logprobs, answered.end.finish_reason)
            for index, answered in enumerate(answers)
        ]
        return {
            **self.head(self.kind, choices),
            "usage": usage_of([answered.end for answered in answers], self._answers),
        }

    def begin(self) -> str:
        return ""

    def item(self, index: int, item: Thought | Piece | ToolCall) -> str:
        assert isinstance(item, Piece)  # The answer is one text.
        return event(self.head(self.kind, [self._choice(index, item.text, item.logprobs, None)]))

    def end(self, index: int, end: End) -> str:
        self._ends.append(end)
        return event(self.head(self.kind, [self._choice(index, "", None, end.finish_reason)]))

    def _choice(self, index: int, text: str, entries: Any, reason: str | None) -> dict[str, Any]:
        logprobs = None if entries is None or not self._logprobs else _logprobs(entries)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _logprobs(entries: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> dict[str, Any]:
    return {
        "tokens": [entry.text for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [None if entry.logprob is None else by_text(entry) for entry in entries],
        "text_offset": [entry.offset for entry in entries],
    }
