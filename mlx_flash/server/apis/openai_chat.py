"""OpenAI's chat completions: /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ...text.answer_parts import Thought, ToolCall
from ...text.chat_template import RESERVED_VARIABLES
from ..api_errors import ApiError
from ..jobs import End, Piece
from .answer_form import Answered, event
from .openai_common import (
    FIRST_ERROR,
    NOT_DONE,
    NOT_DONE_IN_CHAT,
    Message,
    OpenAiForm,
    OpenAiRequest,
    Tokens,
    Whole,
    chat_logprob,
    usage_of,
)
from .question import Dialogue, Question, Sampling, Structure


class ChatRequest(OpenAiRequest):
    not_done: ClassVar[dict[str, tuple[Any, ...]]] = NOT_DONE | NOT_DONE_IN_CHAT

    messages: Annotated[list[Message], Field(min_length=1), FIRST_ERROR]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[dict[str, Any]], FIRST_ERROR] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    grammar: dict[str, Any] | None = None  # an extension, in the form of OpenAI's custom tools
    thinking_budget: Annotated[Whole, Field(ge=0)] | None = None  # an extension, in tokens
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

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

    @property
    def _ends_within_thoughts(self) -> bool:
        last, more = self.messages[-1], self.messages[-1].model_extra or {}
        thinks = bool(more.get("reasoning_content")) and not more.get("tool_calls")
        return last.role == "assistant" and not last.text and thinks

    def question(self, sampling: Sampling) -> Question:
        """What the request asks. Raises ApiError."""
        choice, name = tool_choice_of(self.tool_choice, self.tools)
        dialogue = Dialogue(
            [message.plain() for message in self.messages],
            self.tools,
            choice,
            name,
            one_call=self.parallel_tool_calls is False or name is not None,
            variables=template_variables(self.reasoning_effort, self.chat_template_kwargs),
            generation_prompt=self.add_generation_prompt is not False,
            continues=self.continues,
            structure=structure_of(self.response_format, self.grammar),
            thinking_tokens=self.thinking_budget,
        )
        return Question(dialogue, self.asked, sampling, self.stops(), self.top, self.n or 1)

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
        check_tools(self.tools)
        check_template_variables(self.chat_template_kwargs)
        if self.continue_final_message and not (self._ends_within_an_answer or self._ends_within_thoughts):
            message = (
                "continue_final_message needs a last message from the assistant, with text or reasoning_content and "
                "without tool calls."
            )
            raise ApiError(400, message, param="continue_final_message")
        if self.continue_final_message and self.add_generation_prompt:
            message = "continue_final_message and add_generation_prompt exclude each other. Send only one of them."
            raise ApiError(400, message, param="continue_final_message")


Tool = dict[str, Any]
ToolChoice = Literal["auto", "none", "required"]


def template_variables(effort: str | None, given: dict[str, Any] | None) -> dict[str, Any]:
    """The variables for the template, besides messages and tools. given: chat_template_kwargs."""
    variables: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    if effort == "none":
        variables["enable_thinking"] = False
    return variables | (given or {})


def check_template_variables(given: dict[str, Any] | None) -> None:
    """Raises ApiError for variables that the server sets. given: chat_template_kwargs."""
    if taken := RESERVED_VARIABLES & (given or {}).keys():
        message = f"chat_template_kwargs may not have {min(taken)}: the server sets it. Leave it out."
        raise ApiError(400, message, param="chat_template_kwargs")


def tool_choice_of(given: str | dict[str, Any] | None, tools: list[Tool] | None) -> tuple[ToolChoice, str | None]:
    """(the choice, the name of the tool that must be called). Raises ApiError."""
    names = [tool["function"]["name"] for tool in tools or ()]
    if isinstance(given, dict):
        function = given.get("function")
        name = function.get("name") if given.get("type") == "function" and isinstance(function, dict) else None
        if name not in names:
            message = f"tool_choice names {name!r:.80}, expected {{'type': 'function', 'function': {{'name': ...}}}} "
            raise ApiError(400, message + f"with one of the tools ({', '.join(names):.200}).", param="tool_choice")
        return "required", name
    if given not in (None, "auto", "none", "required"):
        message = f"tool_choice is {given!r:.40}, expected 'auto', 'none', 'required', or a function by its name."
        raise ApiError(400, message, param="tool_choice")
    if given == "required" and not names:
        raise ApiError(400, "tool_choice is 'required', but there are no tools.", param="tool_choice")
    return given or "auto", None  # type: ignore[return-value]


def check_tools(tools: list[Tool] | None) -> None:
    """Raises ApiError if one of the tools is not a function."""
    for tool in tools or ():
        function: Any = tool.get("function")
        ok = tool.get("type") == "function" and isinstance(function, dict)
        if not ok or not isinstance(function.get("name"), str) or not function["name"]:
            message = "tools must be functions: {'type': 'function', 'function': {'name': ...}}."
            raise ApiError(400, message, param="tools")
        if not isinstance(function.get("parameters") or {}, dict):
            message = f"the parameters of the tool {function['name']:.80} must be a JSON schema."
            raise ApiError(400, message, param="tools")


def structure_of(response_format: dict[str, Any] | None, grammar: dict[str, Any] | None) -> Structure | None:
    """What the answer's text must be. Raises ApiError."""
    kind = "text" if response_format is None else response_format.get("type")
    if grammar is not None:
        if kind != "text":
            raise ApiError(400, "grammar and response_format exclude each other. Send only one.", param="grammar")
        syntax, definition = grammar.get("syntax"), grammar.get("definition")
        if syntax not in ("lark", "regex") or not isinstance(definition, str):
            message = "grammar must be {'syntax': 'lark' or 'regex', 'definition': a text}."
            raise ApiError(400, message, param="grammar")
        return Structure(syntax, definition, "grammar")
    if kind == "text":
        return None
    if kind == "json_object":
        return Structure("json_object", None, "response_format")
    if kind != "json_schema":
        message = f"response_format has the type {kind!r:.40}, expected 'text', 'json_object' or 'json_schema'."
        raise ApiError(400, message, param="response_format")
    inner = (response_format or {}).get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        message = (
            "response_format lacks a schema: {'type': 'json_schema', 'json_schema': {'name': ..., 'schema': {...}}}."
        )
        raise ApiError(400, message, param="response_format")
    return Structure("json_schema", schema, "response_format")


class ChatForm(OpenAiForm):
    kind = "chat.completion.chunk"

    def __init__(self, request: ChatRequest, model: str) -> None:
        super().__init__("chatcmpl", request, model)
        self._calls: dict[int, int] = {}  # choice -> number of its calls so far

    def whole(self, answers: list[Answered]) -> dict[str, Any]:
        choices = [self._choice(index, answered) for index, answered in enumerate(answers)]
        usage = usage_of([answered.end for answered in answers], self._answers)
        return {**self.head("chat.completion", choices), "usage": usage}

    def _choice(self, index: int, answered: Answered) -> dict[str, Any]:
        nothing = None if answered.calls or answered.thoughts else ""
        message: dict[str, Any] = {"role": "assistant", "content": answered.text or nothing, "refusal": None}
        if answered.thoughts:
            message["reasoning_content"] = answered.thoughts
        if answered.calls:
            message["tool_calls"] = [_tool_call(call) for call in answered.calls]
        logprobs = None
        if self._logprobs:
            logprobs = {"content": [chat_logprob(entry) for entry in answered.logprobs], "refusal": None}
        reason = answered.end.finish_reason
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def begin(self) -> str:
        first = {"role": "assistant", "content": ""}
        return "".join(self._chunk(index, first) for index in range(self._answers))

    def item(self, index: int, item: Thought | Piece | ToolCall) -> str:
        if isinstance(item, Thought):
            return self._chunk(index, {"reasoning_content": item.text})
        if isinstance(item, ToolCall):
            number = self._calls.get(index, 0)
            self._calls[index] = number + 1
            return self._chunk(index, {"tool_calls": [{"index": number, **_tool_call(item)}]})
        logprobs = None
        if self._logprobs:
            logprobs = {"content": [chat_logprob(entry) for entry in item.logprobs], "refusal": None}
        return self._chunk(index, {"content": item.text}, logprobs)

    def end(self, index: int, end: End) -> str:
        self._ends.append(end)
        return self._chunk(index, {}, None, end.finish_reason)

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return event(self.head(self.kind, [choice]))


def _tool_call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments_text}}
