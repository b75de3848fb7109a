"""The input of OpenAI's Responses API: items, which become the messages of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from ..api_errors import ApiError
from .openai_common import FIRST_ERROR, Message, Part, StrictModel
from .recent_items import RecentItems

ABOVE = ("system", "developer")


class MessageItem(Message):
    role: Literal["user", "assistant", "system", "developer"]


class FunctionCallItem(StrictModel):
    call_id: str
    name: Annotated[str, Field(min_length=1)]
    arguments: str  # JSON


class FunctionOutputItem(StrictModel):
    call_id: str
    output: str | Annotated[list[Part], FIRST_ERROR]

    @property
    def text(self) -> str:
        return self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)


class ReasoningPart(StrictModel):
    text: str


class ReasoningItem(StrictModel):
    """Thoughts of an earlier answer. Encrypted ones, which another server made, are not read."""

    content: Annotated[list[ReasoningPart], FIRST_ERROR] | None = None
    summary: Annotated[list[ReasoningPart], FIRST_ERROR] | None = None

    @property
    def text(self) -> str:
        if self.content:
            return "".join(part.text for part in self.content)
        return "\n\n".join(part.text for part in self.summary or ())


class ReferenceItem(StrictModel):
    id: str


KINDS: dict[str, type[StrictModel]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionOutputItem,
    "reasoning": ReasoningItem,
    "item_reference": ReferenceItem,
}


def _kind_of(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else "other"
    if kind is None:
        kind = "item_reference" if "id" in item and "role" not in item else "message"
    return f"[{kind}]" if kind in KINDS else "[other]"  # `parse` leaves names with brackets out of its message.


def _refuse(item: Any) -> Any:
    """An unknown item is refused: its content would be lost without a word."""
    if not isinstance(item, dict):
        raise PydanticCustomError("item", "expected an object with a type")
    kind = item.get("type")
    message = "items of the type {kind} are not supported, expected {known}"
    raise PydanticCustomError("item", message, {"kind": f"{kind!r:.80}", "known": ", ".join(KINDS)})


Item = Annotated[
    Annotated[MessageItem, Tag("[message]")]
    | Annotated[FunctionCallItem, Tag("[function_call]")]
    | Annotated[FunctionOutputItem, Tag("[function_call_output]")]
    | Annotated[ReasoningItem, Tag("[reasoning]")]
    | Annotated[ReferenceItem, Tag("[item_reference]")]
    | Annotated[Any, BeforeValidator(_refuse), Tag("[other]")],
    Discriminator(_kind_of),
]


def with_references(items: Sequence[Any], recent: RecentItems) -> list[Any]:
    """The items, with those that are named by id. Raises ApiError for an unknown id.

    An id may occur once: the prompt of a small request with many of them would be huge.
    """
    found: list[Any] = []
    named: set[str] = set()
    for index, item in enumerate(items):
        if not isinstance(item, ReferenceItem):
            found.append(item)
            continue
        held = None if item.id in named else recent.find(item.id)
        if held is None:
            what = "refers again to" if item.id in named else "refers to"
            raise ApiError(
                400,
                f"input.{index} {what} the item {item.id!r:.80}, which is not kept: this server remembers the items of "
                "its most recent responses only, each for one use in a request. Send the whole item; many clients do "
                "with store: false.",
                param="input",
                code="item_not_found",
            )
        named.add(item.id)
        found.append(KINDS[held["type"]].model_validate(held))
    return found


def messages_of(instructions: str | None, items: Sequence[Any]) -> list[dict[str, Any]]:
    """The items as messages in the form of chat completions."""
    made = _Messages()
    if instructions:
        made.add_above("system", instructions)
    for item in items:
        if isinstance(item, ReasoningItem):
            made.thoughts = _joined(made.thoughts, item.text)
        elif isinstance(item, FunctionCallItem):
            made.add_call(item)
        elif isinstance(item, FunctionOutputItem):
            made.add({"role": "tool", "tool_call_id": item.call_id, "content": item.text})
        elif item.role == "assistant":
            made.add_answer(item.text)
        elif item.role in ABOVE:
            made.add_above(item.role, item.text)
        else:
            made.add({"role": item.role, "content": item.text})
    made.place_thoughts()
    return made.messages


class _Messages:
    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.thoughts = ""  # those of the assistant message that follows

    def add(self, message: dict[str, Any]) -> None:
        self.place_thoughts()
        self.messages.append(message)

    def add_above(self, role: str, text: str) -> None:
        """Adds instructions. Those at the beginning become one message, since many templates read only one."""
        if len(self.messages) == 1 and self.messages[0]["role"] in ABOVE:
            self.messages[0]["content"] = _joined(self.messages[0]["content"], text)
        else:
            self.add({"role": role, "content": text})

    def add_answer(self, text: str) -> None:
        last = self._last_answer()
        if last is None or (last["content"] and "tool_calls" not in last):
            last = self._begin_answer()
        last["content"] = _joined(last["content"], text)
        self.place_thoughts()

    def add_call(self, call: FunctionCallItem) -> None:
        last = self._last_answer() or self._begin_answer()
        function = {"name": call.name, "arguments": call.arguments}
        last.setdefault("tool_calls", []).append({"id": call.call_id, "type": "function", "function": function})
        self.place_thoughts()

    def place_thoughts(self) -> None:
        """Adds the thoughts that were found to the last answer; to an empty one if no answer precedes them."""
        if self.thoughts:
            last = self._last_answer() or self._begin_answer()
            last["reasoning_content"] = _joined(last.get("reasoning_content", ""), self.thoughts)
            self.thoughts = ""

    def _last_answer(self) -> dict[str, Any] | None:
        return self.messages[-1] if self.messages and self.messages[-1]["role"] == "assistant" else None

    def _begin_answer(self) -> dict[str, Any]:
        self.messages.append({"role": "assistant", "content": ""})
        return self.messages[-1]


def _joined(first: str, second: str) -> str:
    return f"{first}\n\n{second}" if first and second else first + second
