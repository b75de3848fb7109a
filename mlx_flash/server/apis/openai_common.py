"""What OpenAI's chat and text completions have in common: parses and checks requests, and builds parts of answers.

Unknown parameters are ignored, as in most servers. Parameters that would change the answer, but are not supported, are
refused; NOT_DONE lists them.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ...text.generation_config import GenerationConfig
from ...text.images import from_url
from ...text.sampling import Sampling
from ..api_errors import ApiError
from ..jobs import End, TokenLogprob, new_id
from .answer_form import AnswerForm, event
from .image_parts import image_part, read, text_part

MOST_STOPS = 256
MOST_ANSWERS = 4  # for one prompt
FIRST_ERROR = Field(fail_fast=True)  # Stop at the first error in a list: a large body may hold a million of them.
R = TypeVar("R", bound=BaseModel)
OTHER_KIND = {"string_type", "list_type"}  # These errors only say which kind a text-or-list value is not.
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
IMAGE_PARTS = ("image_url", "input_image")

# Unsupported parameters of OpenAI and of other servers that change the answer, with their values that change nothing.
# null always changes nothing.
NOT_DONE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"), ()),
    **dict.fromkeys(("prompt_logprobs", "truncate_prompt_tokens", "adapters", "prompt_embeds", "n_predict"), ()),
    **dict.fromkeys(("stop_token_ids", "allowed_token_ids", "bad_words", "logits_processors", "samplers"), ([],)),
    **dict.fromkeys(("use_beam_search", "ignore_eos", "include_stop_str_in_output"), (False,)),
    **dict.fromkeys(("skip_special_tokens", "spaces_between_special_tokens"), (True,)),
    **dict.fromkeys(("min_tokens", "mirostat", "xtc_probability", "dry_multiplier", "dynatemp_range", "top_a"), (0,)),
    **dict.fromkeys(("length_penalty", "typical_p", "tfs_z", "repeat_penalty"), (1,)),
    **dict.fromkeys(("repetition_context_size", "presence_context_size", "frequency_context_size"), (20,)),
    "top_n_sigma": (-1, 0),
    "json_schema": ({},),
}
NOT_DONE_IN_CHAT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("audio", "web_search_options", "role_mapping", "thinking", "enable_thinking"), ()),
    **dict.fromkeys(("functions", "documents"), ([],)),
    **dict.fromkeys(("echo", "add_special_tokens"), (False,)),
    "chat_template": ("",),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "verbosity": ("medium",),
}
INSTEAD = {
    "functions": "send tools",
    "function_call": "send tools and tool_choice",
    "n_predict": "send max_tokens",
    "repeat_penalty": "send repetition_penalty",
    **dict.fromkeys(("thinking", "enable_thinking", "documents"), "send chat_template_kwargs"),
}


def _whole(value: Any) -> Any:
    """Converts a whole number written as 20.0 into 20."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def count_or_off(value: Any) -> Any:
    """Converts false into None. Chat requests write false for off."""
    return None if value is False else _whole(value)


def _is_text(kind: str) -> str:
    if kind not in TEXT_PARTS:
        raise PydanticCustomError("part", "this model reads only text, expected 'text'")
    return kind


Whole = Annotated[int, BeforeValidator(_whole)]
Seed = Annotated[Whole, Field(ge=-(2**63), lt=2**64)]
Tokens = Annotated[Whole, Field(ge=-1, lt=2**64)]  # Python refuses to print integers of thousands of digits.


class StrictModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(StrictModel):
    include_usage: bool | None = None


class Part(StrictModel):
    type: Annotated[str, AfterValidator(_is_text)]
    text: str = Field(validation_alias=AliasChoices("text", "refusal"))


class ImageUrl(StrictModel):
    url: str  # a data URL


class ContentPart(Part):
    """A part of a message: a text, or an image in a data URL."""

    image_url: str | ImageUrl | None = None

    @model_validator(mode="before")
    @classmethod
    def _image(cls, given: Any) -> Any:
        """An image as a part with an empty text."""
        if not isinstance(given, dict):
            return given
        if given.get("type") not in IMAGE_PARTS:
            return {**given, "image_url": None}
        if given.get("image_url") is None:
            raise PydanticCustomError("part", "a part of this type needs image_url")
        return {"type": "text", "text": "", "image_url": given["image_url"]}

    @property
    def image(self) -> str | None:
        return self.image_url.url if isinstance(self.image_url, ImageUrl) else self.image_url


class Message(StrictModel):
    model_config = ConfigDict(strict=True, extra="allow")  # A template may use more, such as names and tool calls.
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[str | ContentPart], FIRST_ERROR] | None = None

    @model_validator(mode="after")
    def _has_images_of_a_user(self) -> Message:
        if self.images and self.role != "user":
            raise PydanticCustomError("part", "only messages of the role 'user' may have images")
        return self

    @property
    def images(self) -> list[str]:
        """The URLs of the message's images."""
        parts = self.content if isinstance(self.content, list) else []
        return [part.image for part in parts if isinstance(part, ContentPart) and part.image is not None]

    @property
    def seen(self) -> str | list[dict[str, Any]]:
        """The content as one text, or as parts if there are images. Raises ApiError."""
        if not self.images:
            return self.text
        found: list[dict[str, Any]] = []
        for part in self.content or []:
            if isinstance(part, ContentPart) and part.image is not None:
                found.append(image_part(read(from_url, part.image, "messages")))
            elif text := part if isinstance(part, str) else part.text:
                found.append(text_part(text))
        return found

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part if isinstance(part, str) else part.text for part in self.content or [])

    def plain(self) -> dict[str, Any]:
        """The message as chat templates expect it: the content as one text, and the older functions as tools.

        A content with images stays parts (image_parts.py). Raises ApiError.
        """
        message = {**(self.model_extra or {}), "role": self.role, "content": self.seen}
        if self.role == "function":
            message["role"] = "tool"
        if (call := message.pop("function_call", None)) is not None and not message.get("tool_calls"):
            message["tool_calls"] = [{"type": "function", "function": call}]
        return message


class OpenAiRequest(StrictModel):
    """The common part of chat and text completion requests."""

    model_config = ConfigDict(strict=True, extra="allow")
    not_done: ClassVar[dict[str, tuple[Any, ...]]] = NOT_DONE

    model: str | None = None
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Seed | None = None
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS), FIRST_ERROR] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Whole | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0, le=10)] | None = None
    logit_bias: dict[str, Any] | None = None  # by token id; checked with the vocabulary
    response_format: dict[str, Any] | None = None

    @property
    def asked(self) -> int | None:
        """Maximum tokens of the answer; None: as many as fit."""
        return None if self.max_tokens == -1 else self.max_tokens

    @property
    def top(self) -> int | None:
        """The number of likeliest tokens to report for each token; None: no probabilities."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def stops(self) -> tuple[str, ...]:
        words = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(word for word in words if word)

    def sampling(self, vocabulary: int, model: GenerationConfig) -> Sampling:
        """The settings in the request; the others from the model's own, else OpenAI's defaults. Raises ApiError."""
        asked: dict[str, Any] = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "min_p": self.min_p,
            "seed": None if self.seed is None else self.seed % 2**64,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "repetition_penalty": self.repetition_penalty,
        }
        bias = dict(_bias(*item, vocabulary) for item in (self.logit_bias or {}).items())
        given = {name: value for name, value in asked.items() if value is not None}
        return replace(Sampling(logit_bias=bias).with_defaults(model), **given)

    def check(self) -> None:
        """Raises ApiError for parameters that are not supported."""
        for name, harmless in self.not_done.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and not any(value == each and type(value) in _kinds(each) for each in harmless):
                instead = INSTEAD.get(name, "leave it out")
                raise ApiError(400, f"{name} is not supported: {instead}.", param=name, code="unsupported")
        if self.n is not None and not 1 <= self.n <= MOST_ANSWERS:
            raise ApiError(400, f"n is {self.n}, expected 1 to {MOST_ANSWERS}.", param="n")
        if 0 < (self.repetition_penalty or 0) < 0.01:  # Logits would overflow.
            raise ApiError(400, "repetition_penalty is below 0.01, expected 0.01 to 10.", param="repetition_penalty")


def _kinds(value: Any) -> tuple[type, ...]:
    """The types that count as equal to a value: 1.0 equals 1, but true does not."""
    return (int, float) if type(value) is int else (type(value),)


def parse(kind: type[R], body: bytes) -> R:
    """Parses a request. Raises ApiError for invalid JSON, or for the first invalid parameter, which it names."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        deepest = max(errors, key=lambda each: len(each["loc"]))
        first = next((e for e in errors if e["type"] not in OTHER_KIND), deepest)
        if first["type"] == "json_invalid":
            raise ApiError(400, _json_fault(first["ctx"]["error"]), code="invalid_json") from None
        where = [
            str(part) for part in first["loc"] if part not in ("str", "Part", "ContentPart") and "[" not in str(part)
        ]
        name, param = (".".join(where), where[0]) if where else ("the body", None)
        raise ApiError(400, f"{name}: {first['msg']}.", param=param, code="invalid_value") from None


def _json_fault(error: str) -> str:
    """The message for invalid JSON. error: the parser's message, with the place."""
    what, at, place = error.partition(" at line ")
    if "surrogate" in what or "hex escape" in what:
        what = "an escape such as \\ud800 is half of a character; send both halves, or the character itself in UTF-8"
    elif "unicode code point" in what:
        what = "it has bytes that are not UTF-8 text"
    return f"the body is not valid JSON (line {place}): {what}." if at else f"the body is not valid JSON: {what}."


def _bias(key: str, value: Any, vocabulary: int) -> tuple[int, float]:
    """Checks one entry of logit_bias. Returns (token id, bias)."""
    if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary):
        message = f"logit_bias has a key {key!r:.40}, expected token ids from 0 to {vocabulary - 1}."
        raise ApiError(400, message, param="logit_bias")
    if type(value) not in (int, float) or not -100 <= value <= 100:
        raise ApiError(400, f"logit_bias has a value {value!r:.40}, expected -100 to 100.", param="logit_bias")
    return int(key), float(value)


# -- answers -------------------------------------------------------------------------------------------------


def by_text(entry: TokenLogprob) -> dict[str, float | None]:
    """Text -> log-probability of the likeliest tokens, likeliest first.

    If several tokens have the same text, it names the chosen one, or else the likeliest; the others are named by id.
    """
    owner = {each.text: each.token for each in reversed(entry.top)}
    if any(each.token == entry.token for each in entry.top):
        owner[entry.text] = entry.token
    names = [each.text if owner[each.text] == each.token else f"token_id:{each.token}" for each in entry.top]
    return {name: each.logprob for name, each in zip(names, entry.top, strict=True)}


def chat_logprob(entry: TokenLogprob) -> dict[str, Any]:
    return {**_one_logprob(entry), "top_logprobs": [_one_logprob(each) for each in entry.top]}


def _one_logprob(entry: TokenLogprob) -> dict[str, Any]:
    return {"token": entry.text, "logprob": entry.logprob, "bytes": list(entry.added)}


def usage_of(ends: list[End], answers: int) -> dict[str, Any]:
    """The tokens of all choices. answers: for each prompt, which counts once."""
    prompts, generated = ends[::answers], sum(end.generated_tokens for end in ends)
    return {
        "prompt_tokens": sum(end.prompt_tokens for end in prompts),
        "completion_tokens": generated,
        "total_tokens": sum(end.prompt_tokens for end in prompts) + generated,
        "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in prompts)},
        "completion_tokens_details": {"reasoning_tokens": sum(end.thought_tokens for end in ends)},
    }


class OpenAiForm(AnswerForm):
    """The common part of the forms of chat and text completions. kind: of a stream's chunks."""

    kind: str

    def __init__(self, prefix: str, request: OpenAiRequest, model: str) -> None:
        self.id, self.created, self.model = new_id(prefix), int(time.time()), model
        self._answers, self._logprobs, self._usage = request.n or 1, request.top is not None, request.include_usage
        self._ends: list[End] = []

    def finish(self) -> str:
        usage = ""
        if self._usage:  # a chunk without choices
            usage = event({**self.head(self.kind, []), "usage": usage_of(self._ends, self._answers)})
        return f"{usage}data: [DONE]\n\n"

    def failed(self, error: ApiError) -> str:
        return f"{event(error.body())}data: [DONE]\n\n"

    def head(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
