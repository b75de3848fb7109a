"""The input of OpenAI's Responses API: items, which become the messages of a chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
    return (
        f"[{kind}]" if isinstance(kind, str) and kind in KINDS else "[other]"
    )  # `parse` leaves names with brackets out of its message.


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
    turns = _Turns()
    if instructions:
        turns.add_above("system", instructions)
    for item in items:
        if isinstance(item, ReasoningItem):
            turns.thoughts += [item.text] if item.text else []
        elif isinstance(item, FunctionCallItem):
            turns.add_call(item)
        elif isinstance(item, FunctionOutputItem):
            turns.add("tool", item.text, tool_call_id=item.call_id)
        elif item.role == "assistant":
            turns.add_answer(item.text)
        elif item.role in ABOVE:
            turns.add_above(item.role, item.text)
        else:
            turns.add(item.role, item.text)
            turns.turns[-1].seen = item.seen if item.images else None
    turns.place_thoughts()
    return [turn.message() for turn in turns.turns]


@dataclass
class _Turn:
    role: str
    texts: list[str]
    thoughts: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    seen: Any = None  # parts, if there are images

    def message(self) -> dict[str, Any]:
        message = {"role": self.role, **self.more, "content": self.seen or "\n\n".join(filter(None, self.texts))}
        if self.thoughts:
            message["reasoning_content"] = "\n\n".join(self.thoughts)
        if self.calls:
            message["tool_calls"] = self.calls
        return message


class _Turns:
    def __init__(self) -> None:
        self.turns: list[_Turn] = []
        self.thoughts: list[str] = []  # of the answer that follows

    def add(self, role: str, text: str, **more: Any) -> None:
        self.place_thoughts()
        self.turns.append(_Turn(role, [text], more=more))

    def add_above(self, role: str, text: str) -> None:
        """Adds instructions. Those at the beginning become one message, since many templates read only one."""
        if len(self.turns) == 1 and self.turns[0].role in ABOVE and not self.thoughts:
            self.turns[0].texts.append(text)
        else:
            self.add(role, text)

    def add_answer(self, text: str) -> None:
        """Adds the text of an answer. A text next to another is a new answer, unless calls lie between them."""
        answer = self._last_answer()
        if any(answer.texts) and not answer.calls:
            answer = self._begin_answer()
        answer.texts.append(text)
        self.place_thoughts()

    def add_call(self, call: FunctionCallItem) -> None:
        function = {"name": call.name, "arguments": call.arguments}
        self._last_answer().calls.append({"id": call.call_id, "type": "function", "function": function})
        self.place_thoughts()

    def place_thoughts(self) -> None:
        """Gives the thoughts to the last answer; to an empty one if the input has no answer in their place."""
        if self.thoughts:
            self._last_answer().thoughts += self.thoughts
            self.thoughts = []

    def _last_answer(self) -> _Turn:
        """The last turn if it is an answer, else a new one."""
        last = self.turns[-1] if self.turns else None
        return last if last is not None and last.role == "assistant" else self._begin_answer()

    def _begin_answer(self) -> _Turn:
        self.turns.append(_Turn("assistant", []))
        return self.turns[-1]
