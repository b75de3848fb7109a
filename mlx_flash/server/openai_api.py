"""OpenAI's requests, checked, and its answers. Parameters that are not named here are ignored, as most servers do."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ApiError
from .jobs import End, Job, Piece, Sampling, TokenLogprob

MOST_STOPS = 4
FIRST_ERROR = Field(fail_fast=True)  # of a list: a large body may hold a million, and each takes memory
R = TypeVar("R", bound=BaseModel)
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Tokens = Annotated[int, Field(ge=1, lt=2**31)]  # Python refuses to write integers of thousands of digits
OTHER_KIND = {"string_type", "list_type"}  # of a value that may be a text or a list: which of the two it is not


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(_Strict):
    include_usage: bool | None = None


class TextPart(_Strict):
    type: Literal["text", "input_text"]
    text: str


class Message(_Strict):
    model_config = ConfigDict(strict=True, extra="allow")  # a template may want more: names, tool calls
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], FIRST_ERROR] | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates want it: one text."""
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or [])
        role = "system" if self.role == "developer" else self.role
        return {**(self.model_extra or {}), "role": role, "content": content}


class _Request(_Strict):
    """What chat and plain completions have in common."""

    model: str | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=1e-6, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS), FIRST_ERROR] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None  # below, logits would overflow
    logit_bias: dict[str, Any] | None = None  # by token id; checked with the vocabulary

    @property
    def prompt_name(self) -> str:
        """The parameter that the prompt is in."""
        raise NotImplementedError

    @property
    def asked(self) -> int | None:
        """Tokens that the answer may have; None: as many as fit."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """How many of the likeliest tokens are wanted beside each; None: no probabilities at all."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def stops(self) -> tuple[str, ...]:
        words = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(word for word in words if word)

    def sampling(self, vocabulary: int) -> Sampling:
        """Raises ApiError for what the model cannot do."""
        temperature = 1.0 if self.temperature is None else self.temperature
        if 0 < temperature < 1e-3:  # logits would overflow
            raise ApiError(400, f"temperature is {temperature}, expected 0, or 0.001 to 2.", param="temperature")
        if (top_k := max(0, self.top_k or 0)) >= vocabulary:
            raise ApiError(400, f"top_k is {top_k}, expected less than the vocabulary of {vocabulary}.", param="top_k")
        return Sampling(
            temperature=temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=top_k,
            min_p=self.min_p or 0.0,
            seed=None if self.seed is None else self.seed % 2**64,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            repetition_penalty=0.0 if self.repetition_penalty in (None, 1) else self.repetition_penalty or 0.0,
            logit_bias=dict(_bias(*item, vocabulary) for item in (self.logit_bias or {}).items()),
        )

    def check(self) -> None:
        """Raises ApiError for what nobody here can do."""
        if self.n not in (None, 1):
            raise ApiError(400, f"n is {self.n}; one answer at a time is made here, so n must be 1.", param="n")


class ChatRequest(_Request):
    messages: Annotated[list[Message], Field(min_length=1), FIRST_ERROR]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: dict[str, Any] | None = None

    @property
    def prompt_name(self) -> str:
        return "messages"

    @property
    def asked(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        super().check()
        if self.response_format is not None and self.response_format.get("type") != "text":
            raise ApiError(400, "only response_format {'type': 'text'} is possible here.", param="response_format")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")


class CompletionRequest(_Request):
    prompt: str | list[Any]  # a text or token ids, or one of them in a list
    max_tokens: Tokens | None = 16
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    @property
    def prompt_name(self) -> str:
        return "prompt"

    @property
    def top(self) -> int | None:
        return self.logprobs

    def check(self) -> None:
        super().check()
        if self.echo:
            raise ApiError(400, "echo is not possible here: put the prompt before the answer.", param="echo")
        if self.suffix:
            raise ApiError(400, "suffix is not possible here: these models only continue a text.", param="suffix")
        if self.best_of not in (None, 1):
            raise ApiError(400, f"best_of is {self.best_of}, expected 1.", param="best_of")

    def one_prompt(self) -> str | list[int]:
        """Raises ApiError for several, and for what is neither text nor token ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and type(prompt[0]) is not int:
            if len(prompt) > 1:
                raise ApiError(400, f"prompt has {len(prompt)} parts; send prompts one by one.", param="prompt")
            prompt = prompt[0]
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(type(i) is int for i in prompt)):
            raise ApiError(400, "prompt is neither a text nor a list of token ids.", param="prompt")
        return prompt


def parse(kind: type[R], body: bytes) -> R:
    """Raises ApiError for what is no JSON, or names the first parameter that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        first = next((e for e in errors if e["type"] not in OTHER_KIND), errors[0])
        if first["type"] == "json_invalid":
            raise ApiError(400, f"the body is no JSON: {first['ctx']['error']}.", code="invalid_json") from None
        where = [str(part) for part in first["loc"] if part != "str" and not str(part).startswith("list[")]
        name, param = (".".join(where), where[0]) if where else ("the body", None)
        raise ApiError(400, f"{name}: {first['msg']}.", param=param, code="invalid_value") from None


def _bias(key: str, value: Any, vocabulary: int) -> tuple[int, float]:
    """One entry of logit_bias, checked."""
    if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary):
        message = f"logit_bias has a key {key!r:.40}, expected token ids from 0 to {vocabulary - 1}."
        raise ApiError(400, message, param="logit_bias")
    if type(value) not in (int, float) or not -100 <= value <= 100:
        raise ApiError(400, f"logit_bias has a value {value!r:.40}, expected -100 to 100.", param="logit_bias")
    return int(key), float(value)


# -- answers -------------------------------------------------------------------------------------------------


class Answer:
    """The answers to one request, in chat's form or in plain completions'."""

    def __init__(self, job: Job, model: str, chat: bool) -> None:
        self.job, self.model, self.chat = job, model, chat

    def whole(self, pieces: list[Piece], end: End) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        logprobs = self._logprobs([entry for piece in pieces for entry in piece.logprobs])
        choice: dict[str, Any] = {"index": 0, "finish_reason": end.finish_reason, "logprobs": logprobs}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        return {**self._head("chat.completion" if self.chat else "text_completion", [choice]), "usage": _usage(end)}

    def begin(self) -> dict[str, Any] | None:
        """What a stream begins with; None for nothing."""
        return self._chunk({"role": "assistant", "content": ""}, None, None) if self.chat else None

    def piece(self, piece: Piece) -> dict[str, Any]:
        logprobs = self._logprobs(piece.logprobs)
        return self._chunk({"content": piece.text} if self.chat else piece.text, logprobs, None)

    def end(self, end: End) -> dict[str, Any]:
        return self._chunk({} if self.chat else "", None, end.finish_reason)

    def usage(self, end: End) -> dict[str, Any]:
        """The chunk after the last one, where it is asked for: no choices."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self._head(kind, []), "usage": _usage(end)}

    def _head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.job.id,
            "object": kind,
            "created": self.job.created,
            "model": self.model,
            "choices": choices,
        }

    def _chunk(self, content: dict[str, Any] | str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta" if self.chat else "text": content, "logprobs": logprobs, "finish_reason": reason}
        return self._head("chat.completion.chunk" if self.chat else "text_completion", [choice])

    def _logprobs(self, entries: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> dict[str, Any] | None:
        if self.job.top_logprobs is None:
            return None
        if self.chat:
            return {"content": [_chat_logprob(entry) for entry in entries], "refusal": None}
        return {
            "tokens": [entry.text for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [_by_text(entry) for entry in entries],
            "text_offset": [entry.offset for entry in entries],
        }


def _by_text(entry: TokenLogprob) -> dict[str, float]:
    """The likeliest tokens, the likeliest first. Where several have one text, it names the chosen one or the likeliest
    of them; the others are named by their ids.
    """
    owner = {each.text: each.token for each in reversed(entry.top)}
    if any(each.token == entry.token for each in entry.top):
        owner[entry.text] = entry.token
    names = [each.text if owner[each.text] == each.token else f"token_id:{each.token}" for each in entry.top]
    return {name: each.logprob for name, each in zip(names, entry.top, strict=True)}


def _chat_logprob(entry: TokenLogprob) -> dict[str, Any]:
    return {**_one_logprob(entry), "top_logprobs": [_one_logprob(each) for each in entry.top]}


def _one_logprob(entry: TokenLogprob) -> dict[str, Any]:
    return {"token": entry.text, "logprob": entry.logprob, "bytes": list(entry.added)}


def _usage(end: End) -> dict[str, Any]:
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.generated_tokens,
        "total_tokens": end.prompt_tokens + end.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": end.cached_tokens},
    }


def model_list(name: str, created: int) -> list[dict[str, Any]]:
    return [{"id": name, "object": "model", "created": created, "owned_by": "mlx_flash"}]


def now() -> int:
    return int(time.time())
