"""Ollama's chat and generate: /api/chat and /api/generate."""

from __future__ import annotations

import time
from abc import abstractmethod
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ...text.answer_parts import Thought, ToolCall
from ...text.generation_config import GenerationConfig
from ...text.images import from_base64
from ..api_errors import ApiError
from ..jobs import End, Piece, Progress, TokenLogprob, new_id
from .answer_form import Answered, AnswerForm, one_line
from .error_forms import ollama_error
from .image_parts import image_part, read, text_part
from .openai_chat import check_tools
from .openai_common import FIRST_ERROR, MOST_STOPS, StrictModel, Whole, chat_logprob
from .question import Dialogue, Question, Sampling, Structure

NANOSECONDS = 1e9  # in a second
LEVELS = ("low", "medium", "high", "max")  # of thinking

Stream = Annotated[bool, BeforeValidator(lambda given: True if given is None else given)]  # true unless told otherwise


class OllamaOptions(StrictModel):
    """The options that change an answer here. Those about Ollama's own memory and threads are ignored."""

    num_predict: Annotated[Whole, Field(ge=-2, lt=2**64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=1000)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS), FIRST_ERROR] | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None

    def sampling(self, model: GenerationConfig) -> Sampling:
        asked: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "seed": None if self.seed in (None, -1) else (self.seed or 0) % 2**64,  # -1 is a random one
            "repetition_penalty": self.repeat_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        return replace(Sampling().with_defaults(model), **given)

    def stops(self) -> tuple[str, ...]:
        words = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(word for word in words if word)


class OllamaRequest(StrictModel):
    """The common part of chat and generate."""

    model: str | None = None
    stream: Stream = True
    think: bool | str | None = None
    format: str | dict[str, Any] | None = None
    options: OllamaOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None

    @property
    def top(self) -> int | None:
        """The number of likeliest tokens to report for each token; None: no probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def of(self) -> Dialogue | list[str | list[int]]:
        """What is to be answered or continued; empty if only the model is to be loaded. Raises ApiError."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises ApiError for what is not supported."""
        if isinstance(self.think, str) and self.think not in LEVELS:
            message = f"think is {self.think!r:.40}, expected true, false, or one of {', '.join(LEVELS)}."
            raise ApiError(400, message, param="think")
        if isinstance(self.format, str) and self.format not in ("", "json"):
            message = f"format is {self.format!r:.40}, expected 'json' or a JSON schema."
            raise ApiError(400, message, param="format")

    def sampling(self, vocabulary: int, model: GenerationConfig) -> Sampling:
        """The settings in the request; the others from the model's own, else temperature 1."""
        return (self.options or OllamaOptions()).sampling(model)

    def question(self, sampling: Sampling) -> Question:
        """What the request asks. Raises ApiError."""
        options = self.options or OllamaOptions()
        most = options.num_predict if (options.num_predict or 0) > 0 else None
        return Question(self.of, most, sampling, options.stops(), self.top)

    def dialogue(self, messages: list[dict[str, Any]], **more: Any) -> Dialogue:
        level = self.think if isinstance(self.think, str) else None
        return Dialogue(
            messages,
            variables={} if level is None else {"reasoning_effort": level},
            thinks=True if level is not None else self.think,  # type: ignore[arg-type]
            structure=self.structure(),
            **more,
        )

    def structure(self) -> Structure | None:
        if not self.format:
            return None
        if self.format == "json":
            return Structure("json_object", None, "format")
        return Structure("json_schema", self.format, "format")


class CalledFunction(StrictModel):
    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)


class MadeCall(StrictModel):
    id: str | None = None
    function: CalledFunction


class OllamaMessage(StrictModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: Annotated[list[MadeCall], FIRST_ERROR] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: Annotated[list[str], FIRST_ERROR] | None = None  # in base64

    def plain(self) -> dict[str, Any]:
        """The message in OpenAI's form. Raises ApiError."""
        message: dict[str, Any] = {"role": self.role, "content": with_files(self.content or "", self.images)}
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [
                {"type": "function", **call.model_dump(exclude_none=True)} for call in self.tool_calls
            ]
        if self.role == "tool":
            message |= {"name": self.tool_name} if self.tool_name else {}
            message |= {"tool_call_id": self.tool_call_id} if self.tool_call_id else {}
        return message


class OllamaChatRequest(OllamaRequest):
    messages: Annotated[list[OllamaMessage], FIRST_ERROR] | None = None
    tools: Annotated[list[dict[str, Any]], FIRST_ERROR] | None = None

    def check(self) -> None:
        super().check()
        check_tools(self.tools)
        if any(message.images and message.role != "user" for message in self.messages or ()):
            raise ApiError(400, "only messages of the role 'user' may have images.", param="images")

    @property
    def of(self) -> Dialogue | list[str | list[int]]:
        if not self.messages:
            return []
        last = self.messages[-1]
        continues = last.role == "assistant" and bool(last.content) and not last.tool_calls
        return self.dialogue([message.plain() for message in self.messages], tools=self.tools, continues=continues)


class OllamaGenerateRequest(OllamaRequest):
    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    suffix: str | None = None
    template: str | None = None
    images: Annotated[list[str], FIRST_ERROR] | None = None  # in base64

    def check(self) -> None:
        super().check()
        if self.raw and self.images:
            raise ApiError(400, "a raw prompt has no place for images. Send raw false.", param="images")
        for name in ("suffix", "template"):
            if getattr(self, name):
                raise ApiError(400, f"{name} is not supported: leave it out.", param=name, code="unsupported")
        if self.raw and self.format:
            raise ApiError(400, "format is not supported for a raw prompt. Send raw false.", param="format")

    @property
    def of(self) -> Dialogue | list[str | list[int]]:
        if not self.prompt:
            return []
        if self.raw:
            return [self.prompt]
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.dialogue(
            [*system, {"role": "user", "content": with_files(self.prompt, self.images)}], param="prompt"
        )


def with_files(text: str, images: list[str] | None) -> str | list[dict[str, Any]]:
    """A content with images, in base64, before its text. Raises ApiError."""
    if not images:
        return text
    files = [image_part(read(from_base64, image, "images")) for image in images]
    return [*files, *([text_part(text)] if text else [])]


class OllamaForm(AnswerForm):
    """A stream is one JSON object in each line. Objects with an empty text keep it alive."""

    media_type = "application/x-ndjson"

    def __init__(self, request: OllamaRequest, model: str) -> None:
        self.id, self.model = new_id("ollama"), request.model or listed_name(model)
        self._logprobs = request.top is not None
        self._began = time.monotonic()

    @abstractmethod
    def _said(self, text: str = "", thoughts: str = "", calls: list[ToolCall] | None = None) -> dict[str, Any]:
        """The fields with what the model has said."""

    def whole(self, answers: list[Answered]) -> dict[str, Any]:
        if not answers:
            return self._object(self._said(), {"done": True, "done_reason": "load"})
        (answered,) = answers
        said = self._said(answered.text, answered.thoughts, answered.calls)
        return self._object(said, self._probabilities(answered.logprobs), self._done(answered.end))

    def begin(self) -> str:
        return ""

    def item(self, index: int, item: Thought | Piece | ToolCall) -> str:
        if isinstance(item, Piece):
            return self._line(self._said(item.text), self._probabilities(item.logprobs))
        return self._line(self._said(calls=[item]) if isinstance(item, ToolCall) else self._said(thoughts=item.text))

    def end(self, index: int, end: End) -> str:
        return self._line(self._said(), self._done(end))

    def finish(self) -> str:
        return ""

    def failed(self, error: ApiError) -> str:
        return one_line(ollama_error(error)) + "\n"

    def waiting(self, progress: Progress | None) -> str:
        return self._line(self._said())

    def _line(self, *fields: dict[str, Any]) -> str:
        return one_line(self._object(*fields)) + "\n"

    def _object(self, *fields: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {"model": self.model, "created_at": timestamp(time.time()), "done": False}
        for each in fields:
            found |= each
        return found

    def _probabilities(self, entries: Any) -> dict[str, Any]:
        found: list[TokenLogprob] = list(entries)
        return {"logprobs": [chat_logprob(entry) for entry in found]} if self._logprobs and found else {}

    def _done(self, end: End) -> dict[str, Any]:
        """The end of an answer. Durations are in nanoseconds; load_duration is the time in the queue."""
        total = time.monotonic() - self._began
        waited = max(0.0, total - end.prompt_seconds - end.answer_seconds)
        return {
            "done": True,
            "done_reason": "length" if end.finish_reason == "length" else "stop",
            "total_duration": round(total * NANOSECONDS),
            "load_duration": round(waited * NANOSECONDS),
            "prompt_eval_count": end.prompt_tokens,
            "prompt_eval_duration": round(end.prompt_seconds * NANOSECONDS),
            "eval_count": end.generated_tokens,
            "eval_duration": round(end.answer_seconds * NANOSECONDS),
        }


class OllamaChatForm(OllamaForm):
    def _said(self, text: str = "", thoughts: str = "", calls: list[ToolCall] | None = None) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if thoughts:
            message["thinking"] = thoughts
        if calls:
            functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
            message["tool_calls"] = [
                {"id": call.id, "function": function} for call, function in zip(calls, functions, strict=True)
            ]
        return {"message": message}


class OllamaGenerateForm(OllamaForm):
    def _said(self, text: str = "", thoughts: str = "", calls: list[ToolCall] | None = None) -> dict[str, Any]:
        return {"response": text, **({"thinking": thoughts} if thoughts else {})}


def listed_name(name: str) -> str:
    """The name of a model in Ollama's form, which has a tag after a colon."""
    return name if ":" in name else f"{name}:latest"


def timestamp(seconds: float) -> str:
    """seconds: since 1970."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
