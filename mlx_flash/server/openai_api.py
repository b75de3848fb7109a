"""OpenAI's requests and answers: parses and checks the requests, and builds the answers.

Unknown parameters are ignored, as in most servers. Parameters that would change the answer, but are not supported, are
refused; NOT_DONE lists them.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from ..text.generation_config import GenerationConfig
from .api_errors import ApiError
from .jobs import End, Job, Piece, Sampling, TokenLogprob

MOST_STOPS = 256
FIRST_ERROR = Field(fail_fast=True)  # Stop at the first error in a list: a large body may hold a million of them.
R = TypeVar("R", bound=BaseModel)
OTHER_KIND = {"string_type", "list_type"}  # These errors only say which kind a text-or-list value is not.
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")

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
    "grammar": ("",),
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
# Arguments that the server itself passes to the function that applies a template; not allowed in chat_template_kwargs.
RESERVED = {
    *("messages", "conversation", "conversations", "tools", "chat_template", "tokenizer_kwargs", "tokenize"),
    *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask", "return_dict"),
    *("return_tensors", "padding", "truncation", "max_length", "sanitize_control_tokens"),
}


def _whole(value: Any) -> Any:
    """Converts a whole number written as 20.0 into 20."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _count_or_off(value: Any) -> Any:
    """Converts false into None. Chat requests write false for off."""
    return None if value is False else _whole(value)


def _is_text(kind: str) -> str:
    if kind not in TEXT_PARTS:
        raise PydanticCustomError("part", "this model reads only text, expected 'text'")
    return kind


Whole = Annotated[int, BeforeValidator(_whole)]
Seed = Annotated[Whole, Field(ge=-(2**63), lt=2**64)]
Tokens = Annotated[Whole, Field(ge=-1, lt=2**64)]  # Python refuses to print integers of thousands of digits.


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool | None = None


class Part(_Strict):
    type: Annotated[str, AfterValidator(_is_text)]
    text: str = Field(validation_alias=AliasChoices("text", "refusal"))


class Message(_Strict):
    model_config = ConfigDict(strict=True, extra="allow")  # A template may use more, such as names and tool calls.
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[str | Part], FIRST_ERROR] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part if isinstance(part, str) else part.text for part in self.content or [])

    def plain(self) -> dict[str, Any]:
        """The message as chat templates expect it: the content as one text, and the older functions as tools."""
        message = {**(self.model_extra or {}), "role": self.role, "content": self.text}
        if self.role == "function":
            message["role"] = "tool"
        if (call := message.pop("function_call", None)) is not None and not message.get("tool_calls"):
            message["tool_calls"] = [{"type": "function", "function": call}]
        return message


class _Request(_Strict):
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
    def prompt_name(self) -> str:
        """The name of the parameter that holds the prompt."""
        raise NotImplementedError

    @property
    def asked(self) -> int | None:
        """Maximum tokens of the answer; None: as many as fit."""
        return None if self.max_tokens == -1 else self.max_tokens

    @property
    def continues(self) -> bool:
        """Whether the answer's text continues the prompt's."""
        raise NotImplementedError

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
        if self.n not in (None, 1):
            raise ApiError(400, f"n is {self.n}; this server makes one answer per request, so n must be 1.", param="n")
        if 0 < (self.repetition_penalty or 0) < 0.01:  # Logits would overflow.
            raise ApiError(400, "repetition_penalty is below 0.01, expected 0.01 to 10.", param="repetition_penalty")
        if self.response_format is not None and self.response_format.get("type") != "text":
            raise ApiError(400, "only response_format {'type': 'text'} is supported.", param="response_format")


def _kinds(value: Any) -> tuple[type, ...]:
    """The types that count as equal to a value: 1.0 equals 1, but true does not."""
    return (int, float) if type(value) is int else (type(value),)


class ChatRequest(_Request):
    not_done: ClassVar[dict[str, tuple[Any, ...]]] = NOT_DONE | NOT_DONE_IN_CHAT

    messages: Annotated[list[Message], Field(min_length=1), FIRST_ERROR]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Any]], FIRST_ERROR] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def prompt_name(self) -> str:
        return "messages"

    @property
    def asked(self) -> int | None:
        most = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return most if most is not None and most > 0 else None

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def continues(self) -> bool:
        """Whether the last message is the beginning of the answer, and the model continues it."""
        if self.continue_final_message is not None:
            return self.continue_final_message
        return self._ends_within_an_answer and not self.add_generation_prompt

    @property
    def _ends_within_an_answer(self) -> bool:
        last = self.messages[-1]
        return last.role == "assistant" and bool(last.text) and not (last.model_extra or {}).get("tool_calls")

    def tools_for_template(self) -> list[dict[str, Any]] | None:
        return None if self.tool_choice == "none" else self.tools or None

    def template_variables(self) -> dict[str, Any]:
        """The variables for the template, besides messages and tools."""
        effort = self.reasoning_effort
        variables: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
        if effort == "none":
            variables["enable_thinking"] = False
        return variables | (self.chat_template_kwargs or {})

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
        if self.tool_choice not in (None, "auto", "none"):
            raise ApiError(
                400,
                "a tool call cannot be forced: tool_choice must be 'auto' or 'none'.",
                param="tool_choice",
                code="unsupported",
            )
        for tool in self.tools or ():
            function = tool.get("function")
            if tool.get("type") != "function" or not isinstance(function, dict) or "name" not in function:
                message = "tools must be functions: {'type': 'function', 'function': {'name': ...}}."
                raise ApiError(400, message, param="tools")
        if taken := RESERVED & (self.chat_template_kwargs or {}).keys():
            message = f"chat_template_kwargs may not have {min(taken)}: the server sets it. Leave it out."
            raise ApiError(400, message, param="chat_template_kwargs")
        if self.continue_final_message and not self._ends_within_an_answer:
            message = (
                "continue_final_message needs a last message from the assistant, with text and without tool calls."
            )
            raise ApiError(400, message, param="continue_final_message")
        if self.continue_final_message and self.add_generation_prompt:
            message = "continue_final_message and add_generation_prompt exclude each other. Send only one of them."
            raise ApiError(400, message, param="continue_final_message")

    def check_without_template(self) -> None:
        """Raises ApiError for parameters that need a chat template."""
        given = {"tools": self.tools_for_template(), "chat_template_kwargs": self.chat_template_kwargs}
        for name, value in given.items():
            if value:
                raise ApiError(400, f"this model has no chat template, so {name} cannot be used.", param=name)


class CompletionRequest(_Request):
    prompt: str | list[Any]  # a text or token ids, or a list with one of these
    max_tokens: Tokens | None = 16
    logprobs: Annotated[Annotated[int, Field(ge=0, le=5)] | None, BeforeValidator(_count_or_off)] = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: Whole | None = None

    @property
    def prompt_name(self) -> str:
        return "prompt"

    @property
    def continues(self) -> bool:
        return True

    @property
    def top(self) -> int | None:
        return self.logprobs

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0:
            raise ApiError(400, "max_tokens is 0, expected at least 1, or -1 for as many as fit.", param="max_tokens")
        if self.echo:
            raise ApiError(400, "echo is not supported: put the prompt before the answer yourself.", param="echo")
        if self.suffix:
            raise ApiError(400, "suffix is not supported: these models only continue a text.", param="suffix")
        if self.best_of not in (None, 1):
            raise ApiError(400, f"best_of is {self.best_of}, expected 1.", param="best_of")

    def one_prompt(self) -> str | list[int]:
        """The only prompt. Raises ApiError for several, and for one that is neither a text nor token ids."""
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and type(prompt[0]) is not int:
            if len(prompt) > 1:
                raise ApiError(400, f"prompt has {len(prompt)} parts; send prompts one by one.", param="prompt")
            prompt = prompt[0]
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and all(type(i) is int for i in prompt)):
            raise ApiError(400, "prompt is neither a text nor a list of token ids.", param="prompt")
        return prompt


def parse(kind: type[R], body: bytes) -> R:
    """Parses a request. Raises ApiError for invalid JSON, or for the first invalid parameter, which it names."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        first = next((e for e in errors if e["type"] not in OTHER_KIND), errors[0])
        if first["type"] == "json_invalid":
            raise ApiError(400, _json_fault(first["ctx"]["error"]), code="invalid_json") from None
        where = [str(part) for part in first["loc"] if part not in ("str", "Part") and "[" not in str(part)]
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


class Answer:
    """Builds the answers to one request, in the form of chat or text completions."""

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
        """The first chunk of a stream; None if there is none."""
        return self._chunk({"role": "assistant", "content": ""}, None, None) if self.chat else None

    def piece(self, piece: Piece) -> dict[str, Any]:
        logprobs = self._logprobs(piece.logprobs)
        return self._chunk({"content": piece.text} if self.chat else piece.text, logprobs, None)

    def end(self, end: End) -> dict[str, Any]:
        return self._chunk({} if self.chat else "", None, end.finish_reason)

    def usage(self, end: End) -> dict[str, Any]:
        """The final chunk with the usage and no choices, if it was asked for."""
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
    """Text -> log-probability of the likeliest tokens, likeliest first.

    If several tokens have the same text, it names the chosen one, or else the likeliest; the others are named by id.
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


def now() -> int:
    return int(time.time())
