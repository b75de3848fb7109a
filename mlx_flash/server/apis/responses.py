"""OpenAI's Responses API: /v1/responses. It keeps no responses, only the items of recent ones for `item_reference`."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from ..api_errors import ApiError
from .openai_chat import Tool, ToolChoice, check_template_variables, check_tools, template_variables, tool_choice_of
from .openai_common import FIRST_ERROR, NOT_DONE, NOT_DONE_IN_CHAT, OpenAiRequest, StrictModel, Tokens, Whole
from .question import Dialogue, Question, Sampling, Structure
from .recent_items import RecentItems
from .responses_input import Item, MessageItem, messages_of, with_references

# Parameters that must not be ignored, with those to send in their place.
ELSEWHERE = {
    "messages": "send input",
    "max_tokens": "send max_output_tokens",
    "max_completion_tokens": "send max_output_tokens",
    "response_format": "send text.format",
    "reasoning_effort": "send reasoning.effort",
    "grammar": "send it to /v1/chat/completions",
    "previous_response_id": "this server keeps no responses. Send the earlier items in input",
    "conversation": "this server keeps no conversations. Send the earlier items in input",
    "prompt": "this server keeps no prompts. Send instructions and input",
}
OF_FUNCTIONS = ("name", "description", "parameters", "strict")


class ReasoningOptions(StrictModel):
    effort: Annotated[str, Field(max_length=32)] | None = None
    summary: str | None = None  # ignored: the answer has the thoughts themselves


class TextOptions(StrictModel):
    format: dict[str, Any] | None = None


class ResponsesRequest(OpenAiRequest):
    not_done: ClassVar[dict[str, tuple[Any, ...]]] = NOT_DONE | NOT_DONE_IN_CHAT | {"background": (False,)}

    input: str | Annotated[list[Item], FIRST_ERROR]
    instructions: str | None = None
    max_output_tokens: Tokens | None = None
    tools: Annotated[list[dict[str, Any]], FIRST_ERROR] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    store: bool | None = None
    metadata: dict[str, Any] | None = None
    thinking_budget: Annotated[Whole, Field(ge=0)] | None = None  # an extension, in tokens
    chat_template_kwargs: dict[str, Any] | None = None  # an extension

    @property
    def asked(self) -> int | None:
        most = self.max_output_tokens
        return most if most is not None and most > 0 else None

    @property
    def top(self) -> int | None:
        wanted = self.top_logprobs or "message.output_text.logprobs" in (self.include or ())
        return (self.top_logprobs or 0) if wanted else None

    @property
    def functions(self) -> list[dict[str, Any]]:
        """The tools that the model may call. Tools of other types are left out: many run on OpenAI's servers."""
        return [tool for tool in self.tools or () if tool.get("type") == "function"]

    def find_references(self, recent: RecentItems) -> None:
        """Replaces ids by the items that they name. Raises ApiError."""
        if not isinstance(self.input, str):
            self.input = with_references(self.input, recent)

    def question(self, sampling: Sampling) -> Question:
        """What the request asks. Raises ApiError."""
        items = [MessageItem(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        tools, choice, name = self._tools_and_choice()
        effort = self.reasoning.effort if self.reasoning else None
        dialogue = Dialogue(
            messages_of(self.instructions, items),
            tools,
            choice,
            name,
            one_call=self.parallel_tool_calls is False or name is not None,
            variables=template_variables(effort, self.chat_template_kwargs),
            structure=_structure_of(self.text.format if self.text else None),
            thinking_tokens=self.thinking_budget,
            param="input",
        )
        return Question(dialogue, self.asked, sampling, self.stops(), self.top)

    def _tools_and_choice(self) -> tuple[list[Tool], ToolChoice, str | None]:
        """(the tools in the form of chats, the choice, the tool that must be called). Raises ApiError."""
        tools = [_nested(tool) for tool in self.functions]
        given = self.tool_choice
        if not isinstance(given, dict):
            return tools, *tool_choice_of(given, tools)
        names = [tool["function"]["name"] for tool in tools]
        kind, name, allowed = given.get("type"), given.get("name"), given.get("tools")
        if kind == "function" and name in names:
            return tools, "required", name
        if kind == "allowed_tools" and isinstance(allowed, list) and given.get("mode") in ("auto", "required"):
            wanted = [tool.get("name") for tool in allowed if isinstance(tool, dict)]
            tools = [tool for tool in tools if tool["function"]["name"] in wanted]
            return tools, *tool_choice_of(given["mode"], tools)
        message = (
            f"tool_choice has the type {kind!r:.40} and the name {name!r:.80}, expected {{'type': 'function', 'name': "
            f"...}} with one of the tools ({', '.join(names):.200}), or {{'type': 'allowed_tools', 'mode': ..., "
            "'tools': [...]}."
        )
        raise ApiError(400, message, param="tool_choice")

    def check(self) -> None:
        for name, instead in ELSEWHERE.items():
            if getattr(self, name, None) is not None:
                raise ApiError(400, f"{name} is not supported: {instead}.", param=name, code="unsupported")
        super().check()
        if self.n not in (None, 1):
            raise ApiError(400, f"n is {self.n}, expected 1: a response is one answer.", param="n")
        if self.input == []:
            raise ApiError(400, "input is empty, expected a text or items.", param="input")
        for tool in self.tools or ():
            if not isinstance(tool.get("type"), str):
                raise ApiError(400, "tools must have a type, as in {'type': 'function', 'name': ...}.", param="tools")
        for tool in self.functions:
            if not isinstance(tool.get("name"), str) or not tool["name"]:
                raise ApiError(
                    400, "tools must be {'type': 'function', 'name': ..., 'parameters': ...}.", param="tools"
                )
        check_tools([_nested(tool) for tool in self.functions])
        check_template_variables(self.chat_template_kwargs)


def _nested(tool: dict[str, Any]) -> Tool:
    """A function in the form of chat completions."""
    return {"type": "function", "function": {key: tool[key] for key in OF_FUNCTIONS if tool.get(key) is not None}}


def _structure_of(format: dict[str, Any] | None) -> Structure | None:
    """What the answer's text must be. Raises ApiError."""
    kind = "text" if format is None else format.get("type")
    if format is None or kind == "text":
        return None
    if kind == "json_object":
        return Structure("json_object", None, "text")
    if kind != "json_schema":
        message = f"text.format has the type {kind!r:.40}, expected 'text', 'json_object' or 'json_schema'."
        raise ApiError(400, message, param="text")
    if not isinstance(format.get("schema"), dict):
        message = "text.format lacks a schema: {'type': 'json_schema', 'name': ..., 'schema': {...}}."
        raise ApiError(400, message, param="text")
    return Structure("json_schema", format["schema"], "text")
