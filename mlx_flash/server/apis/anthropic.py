"""Anthropic's messages: /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from ...text.answer_parts import Thought, ToolCall
from ...text.generation_config import GenerationConfig
from ...text.images import from_base64, from_url
from ..api_errors import ApiError
from ..jobs import End, Piece, Progress, new_id
from .answer_form import Answered, AnswerForm, event
from .error_forms import anthropic_error
from .image_parts import image_part, joined, read, text_part
from .openai_common import FIRST_ERROR, MOST_STOPS, StrictModel, Whole
from .question import Dialogue, Question, Sampling, Structure

# The fields that each kind of block needs. Other kinds are refused.
BLOCKS = {
    "text": ("text",),
    "image": ("source",),
    "thinking": ("thinking",),
    "redacted_thinking": (),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
}
# Claude Code's first block of the system prompt. It is for Anthropic's accounts, not for the model, and it changes with
# every request, so that the cached prompt could never be reused.
BILLING = "x-anthropic-billing-header:"
PING = event({"type": "ping"}, "ping")
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def _is_readable(kind: str) -> str:
    if kind not in BLOCKS:
        raise PydanticCustomError("block", "this model reads text and images only")
    return kind


def _only_text(kind: str) -> str:
    if kind != "text":
        raise PydanticCustomError("block", "this model reads text only")
    return kind


class TextBlock(StrictModel):
    type: Annotated[str, AfterValidator(_only_text)]
    text: str


class ImageSource(StrictModel):
    type: str
    data: str | None = None
    url: str | None = None

    def file(self) -> bytes:
        """The image's file. Raises ApiError."""
        if self.type == "base64" and self.data is not None:
            return read(from_base64, self.data, "messages")
        return read(from_url, self.url or "", "messages")


class ContentBlock(StrictModel):
    """A text, an image, thoughts, a tool call, or the result of one."""

    type: Annotated[str, AfterValidator(_is_readable)]
    text: str | None = None
    source: ImageSource | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | Annotated[list[TextBlock], FIRST_ERROR] | None = None
    is_error: bool | None = None

    @model_validator(mode="after")
    def _has_its_fields(self) -> ContentBlock:
        for name in BLOCKS[self.type]:
            if getattr(self, name) is None:
                raise PydanticCustomError("block", "a block of this type needs {name}", {"name": name})
        return self

    @property
    def result(self) -> str:
        """The text of a tool's result."""
        text = self.content if isinstance(self.content, str) else _joined_text(self.content or [])
        return f"Error: {text}" if self.is_error else text


def _joined_text(blocks: list[TextBlock] | list[ContentBlock]) -> str:
    return "\n".join(block.text for block in blocks if block.type == "text" and block.text)


class MessagesTurn(StrictModel):
    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[ContentBlock], FIRST_ERROR]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else _joined_text(self.content)

    def of(self, kind: str) -> list[ContentBlock]:
        """The blocks of one type."""
        return [block for block in self.content if isinstance(block, ContentBlock) and block.type == kind]

    def plain(self, tools: dict[str, str]) -> list[dict[str, Any]]:
        """The messages that chat templates expect. tools: id of a call -> name of its tool; calls are added to it.

        Raises ApiError for an image that cannot be read.
        """
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.role == "assistant":
            if thoughts := "\n".join(block.thinking or "" for block in self.of("thinking")):
                message["reasoning_content"] = thoughts
            if calls := self.of("tool_use"):
                tools |= {block.id or "": block.name or "" for block in calls}
                message["tool_calls"] = [_plain_call(block) for block in calls]
            return [message]
        results: list[dict[str, Any]] = []
        for block in self.of("tool_result"):
            name = {"name": tools[block.tool_use_id]} if block.tool_use_id in tools else {}
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, **name, "content": block.result})
        if self.of("image"):
            message["content"] = [
                text_part(block.text or "") if block.source is None else image_part(block.source.file())
                for block in self.content
                if isinstance(block, ContentBlock) and (block.type == "image" or (block.type == "text" and block.text))
            ]
        return [*results, message] if message["content"] or not results else results


def _plain_call(block: ContentBlock) -> dict[str, Any]:
    return {"id": block.id, "type": "function", "function": {"name": block.name, "arguments": block.input}}


class OfferedTool(StrictModel):
    type: str | None = None
    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> OfferedTool:
        if self.type in (None, "custom") and (not self.name or self.input_schema is None):
            raise PydanticCustomError("tool", "a tool needs a name and an input_schema")
        return self

    def plain(self) -> dict[str, Any]:
        """The tool in OpenAI's form."""
        function: dict[str, Any] = {"name": self.name, "parameters": self.input_schema}
        if self.description:
            function["description"] = self.description
        if self.strict:
            function["strict"] = True
        return {"type": "function", "function": function}


class CallChoice(StrictModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(StrictModel):
    type: str
    budget_tokens: Annotated[Whole, Field(ge=0)] | None = None


class OutputConfig(StrictModel):
    format: dict[str, Any] | None = None


class TokenCountRequest(StrictModel):
    """What a request has in common with one that only counts its tokens: all that makes the prompt."""

    model: str | None = None
    messages: Annotated[list[MessagesTurn], Field(min_length=1), FIRST_ERROR]
    system: str | Annotated[list[TextBlock], FIRST_ERROR] | None = None
    tools: Annotated[list[OfferedTool], FIRST_ERROR] | None = None
    tool_choice: CallChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = None  # the older name of output_config.format

    def check(self) -> None:
        """Raises ApiError for a tool_choice without its tool."""
        choice, tools = self.tool_choice, self.plain_tools()
        names = [tool["function"]["name"] for tool in tools]
        if choice is None or choice.type in ("auto", "none"):
            return
        if not names:
            raise ApiError(400, f"tool_choice is {choice.type!r}, but there are no tools.", param="tool_choice")
        if choice.type == "tool" and choice.name not in names:
            message = f"tool_choice names {choice.name!r:.80}, expected one of the tools ({', '.join(names):.200})."
            raise ApiError(400, message, param="tool_choice")

    def dialogue(self) -> Dialogue:
        """Raises ApiError."""
        choice, thinking = self.tool_choice, self.thinking
        kind = "auto" if choice is None else choice.type
        name = choice.name if choice is not None and kind == "tool" else None
        last = self.messages[-1]
        return Dialogue(
            self.plain_messages(),
            self.plain_tools() or None,
            "required" if kind in ("any", "tool") else "none" if kind == "none" else "auto",
            name,
            one_call=name is not None or (choice is not None and bool(choice.disable_parallel_tool_use)),
            thinks=None if thinking is None else {"enabled": True, "disabled": False}.get(thinking.type),
            continues=last.role == "assistant" and bool(last.text) and not last.of("tool_use"),
            structure=self.structure(),
            thinking_tokens=None if thinking is None else thinking.budget_tokens,
        )

    def plain_messages(self) -> list[dict[str, Any]]:
        """The messages in OpenAI's form.

        Consecutive turns of one role are one turn, as in Anthropic's API. Many templates take a system message only in
        the first place, so a later one becomes part of the user's turn.
        """
        found: list[dict[str, Any]] = []

        def add(message: dict[str, Any]) -> None:
            if message["role"] == "system" and any(other["role"] != "system" for other in found):
                message["role"] = "user"
            if found and found[-1]["role"] == message["role"] and message["role"] in ("system", "user"):
                found[-1]["content"] = joined(found[-1]["content"], message["content"])
            else:
                found.append(message)

        if system := self._system_text():
            add({"role": "system", "content": system})
        tools: dict[str, str] = {}
        for turn in self.messages:
            for message in turn.plain(tools):
                add(message)
        return found

    def _system_text(self) -> str:
        if not isinstance(self.system, list):
            return self.system or ""
        return _joined_text([block for block in self.system if not block.text.startswith(BILLING)])

    def plain_tools(self) -> list[dict[str, Any]]:
        """The tools in OpenAI's form, without those that Anthropic's servers would run, which have no schema."""
        return [tool.plain() for tool in self.tools or () if tool.name and tool.input_schema is not None]

    def structure(self) -> Structure | None:
        """What the answer's text must be. Raises ApiError."""
        given = self.output_format if self.output_config is None else self.output_config.format or self.output_format
        if given is None:
            return None
        if given.get("type") != "json_schema" or not isinstance(given.get("schema"), dict):
            message = "output_config.format must be {'type': 'json_schema', 'schema': {...}}."
            raise ApiError(400, message, param="output_config")
        return Structure("json_schema", given["schema"], "output_config")


class MessagesRequest(TokenCountRequest):
    max_tokens: Annotated[Whole, Field(ge=1, lt=2**64)]
    stop_sequences: Annotated[list[str], Field(max_length=MOST_STOPS), FIRST_ERROR] | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1)] | None = None
    stream: bool | None = None

    def sampling(self, vocabulary: int, model: GenerationConfig) -> Sampling:
        """The settings in the request; the others from the model's own, else Anthropic's defaults."""
        top_k = None if self.top_k is None else max(0, self.top_k)
        asked = {"temperature": self.temperature, "top_p": self.top_p, "top_k": top_k}
        given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        return replace(Sampling().with_defaults(model), **given)

    def question(self, sampling: Sampling) -> Question:
        """What the request asks. Raises ApiError."""
        stops = tuple(word for word in self.stop_sequences or () if word)
        return Question(self.dialogue(), self.max_tokens, sampling, stops)


class MessagesForm(AnswerForm):
    def __init__(self, request: MessagesRequest, model: str) -> None:
        self.id, self.model = new_id("msg").replace("-", "_"), model
        self._index = 0  # of the block that is open, or of the next one
        self._open = ""  # the type of the block that is open

    def whole(self, answers: list[Answered]) -> dict[str, Any]:
        (answered,) = answers
        content: list[dict[str, Any]] = []
        for item in answered.items:
            if isinstance(item, ToolCall):
                content.append({**_call_block(item), "input": item.arguments})
                continue
            kind = "thinking" if isinstance(item, Thought) else "text"
            if not content or content[-1]["type"] != kind:
                content.append(_empty_block(kind))
            content[-1][kind] += item.text
        return {**self._head(content), **_stop(answered.end), "usage": _usage(answered.end)}

    def begin(self) -> str:
        usage = {**_no_usage(), "input_tokens": self.prompt_tokens}
        head = {**self._head([]), "stop_reason": None, "stop_sequence": None, "usage": usage}
        return event({"type": "message_start", "message": head}, "message_start") + PING

    def item(self, index: int, item: Thought | Piece | ToolCall) -> str:
        if isinstance(item, ToolCall):
            block, delta = _call_block(item), {"type": "input_json_delta", "partial_json": item.arguments_text}
            return self._close() + self._begin_block(block) + self._delta(delta) + self._close()
        kind = "thinking" if isinstance(item, Thought) else "text"
        before = "" if self._open == kind else self._close() + self._begin_block(_empty_block(kind))
        return before + self._delta({"type": f"{kind}_delta", kind: item.text})

    def end(self, index: int, end: End) -> str:
        done = {"type": "message_delta", "delta": _stop(end), "usage": _usage(end)}
        return self._close() + event(done, "message_delta")

    def finish(self) -> str:
        return event({"type": "message_stop"}, "message_stop")

    def failed(self, error: ApiError) -> str:
        return event(anthropic_error(error), "error")

    def waiting(self, progress: Progress | None) -> str:
        return PING

    def _head(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content}

    def _begin_block(self, block: dict[str, Any]) -> str:
        self._open = block["type"]
        started = {"type": "content_block_start", "index": self._index, "content_block": block}
        return event(started, "content_block_start")

    def _delta(self, delta: dict[str, Any]) -> str:
        return event({"type": "content_block_delta", "index": self._index, "delta": delta}, "content_block_delta")

    def _close(self) -> str:
        """Ends the block that is open, if there is one."""
        if not self._open:
            return ""
        signature = self._delta({"type": "signature_delta", "signature": ""}) if self._open == "thinking" else ""
        closed = signature + event({"type": "content_block_stop", "index": self._index}, "content_block_stop")
        self._open = ""
        self._index += 1
        return closed


def _empty_block(kind: str) -> dict[str, Any]:
    return {"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})}


def _call_block(call: ToolCall) -> dict[str, Any]:
    """A tool call, with its arguments still empty."""
    return {"type": "tool_use", "id": f"toolu_{call.id.removeprefix('call_')}", "name": call.name, "input": {}}


def _stop(end: End) -> dict[str, Any]:
    if end.finish_reason == "stop" and end.stop_word is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": end.stop_word}
    return {"stop_reason": STOP_REASONS[end.finish_reason], "stop_sequence": None}


def _no_usage() -> dict[str, Any]:
    names = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    return dict.fromkeys(names, 0)


def _usage(end: End) -> dict[str, Any]:
    """The tokens of an answer. Anthropic counts those that were cached apart from the others of the prompt."""
    return {
        **_no_usage(),
        "input_tokens": end.prompt_tokens - end.cached_tokens,
        "output_tokens": end.generated_tokens,
        "cache_read_input_tokens": end.cached_tokens,
        "output_tokens_details": {"thinking_tokens": end.thought_tokens},
    }


def anthropic_model(name: str, created: int) -> dict[str, Any]:
    """A model in the list of models. created: seconds since 1970."""
    when = datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"type": "model", "id": name, "display_name": name, "created_at": when, "lifecycle": "active"}


def anthropic_models(names: list[str], created: int) -> dict[str, Any]:
    """The list of models, which has at least one."""
    data = [anthropic_model(name, created) for name in names]
    return {"data": data, "has_more": False, "first_id": names[0], "last_id": names[-1]}
