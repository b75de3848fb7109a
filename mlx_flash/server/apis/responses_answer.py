"""The answers of OpenAI's Responses API, in one piece and as events.

Both are made by the same steps, so that a stream's last event has what the whole answer would have.
"""

from __future__ import annotations

import time
import uuid
from typing import Any

from ...text.answer_parts import Thought, ToolCall
from ..api_errors import ApiError
from ..jobs import End, Piece, Progress
from .answer_form import Answered, AnswerForm, event
from .openai_common import chat_logprob, usage_of
from .recent_items import RecentItems
from .responses import ResponsesRequest

Event = dict[str, Any]
PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
PART_TYPES = {"message": "output_text", "reasoning": "reasoning_text"}


class ResponsesForm(AnswerForm):
    def __init__(self, request: ResponsesRequest, model: str, recent: RecentItems) -> None:
        """recent: keeps the items of the answer, unless the request says otherwise."""
        self.id, self.created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._recent = recent if request.store is not False else None
        self._output = _Output(logprobs=request.top is not None)
        self._end: End | None = None
        self._sequence = 0
        text, reasoning = request.text, request.reasoning
        self._echoed = {
            "background": False,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": model,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
            "store": False,
            "temperature": request.temperature,
            "text": {"format": (text and text.format) or {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.functions,
            "top_logprobs": request.top or 0,
            "top_p": request.top_p,
            "truncation": "disabled",
        }

    def whole(self, answers: list[Answered]) -> dict[str, Any]:
        (answered,) = answers
        for item in answered.items:
            self._output.take(item)
        self.end(0, answered.end)
        return self._finished()

    def begin(self) -> str:
        response = self._response("in_progress")
        kinds = ("response.created", "response.in_progress")
        return self._send([{"type": kind, "response": response} for kind in kinds])

    def waiting(self, progress: Progress | None) -> str:
        """An event, because a comment does not keep codex from giving up."""
        return self._send([{"type": "response.in_progress", "response": self._response("in_progress")}])

    def loading(self) -> str:
        """A comment, because no event may come before the first one of `begin`."""
        return ": loading\n\n"

    def item(self, index: int, item: Thought | Piece | ToolCall) -> str:
        return self._send(self._output.take(item))

    def end(self, index: int, end: End) -> str:
        self._end = end
        return self._send(self._output.finish("incomplete" if end.finish_reason == "length" else "completed"))

    def finish(self) -> str:
        response = self._finished()
        return self._send([{"type": f"response.{response['status']}", "response": response}])

    def failed(self, error: ApiError) -> str:
        code = {429: "rate_limit_exceeded"}.get(
            error.status, "server_error" if error.status >= 500 else "invalid_prompt"
        )
        if not self._sequence:
            return self._send([{"type": "error", "code": code, "message": error.message, "param": error.param}])
        self._output.close("incomplete")
        response = self._response("failed") | {"error": {"code": code, "message": error.message}}
        return self._send([{"type": "response.failed", "response": response}])

    def _send(self, events: list[Event]) -> str:
        sent = []
        for each in events:
            sent.append(event({"type": each["type"], "sequence_number": self._sequence, **each}, each["type"]))
            self._sequence += 1
        return "".join(sent)

    def _finished(self) -> dict[str, Any]:
        """The response at the end. Its items are kept."""
        assert self._end is not None
        if self._recent is not None:
            self._recent.keep(self._output.items)
        usage = _usage(self._end)
        if self._end.finish_reason == "length":
            return self._response("incomplete") | {
                "incomplete_details": {"reason": "max_output_tokens"},
                "usage": usage,
            }
        return self._response("completed") | {"completed_at": int(time.time()), "usage": usage}

    def _response(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            **self._echoed,
            "output": self._output.items,
            "usage": None,
        }


class _Output:
    """The output items of one response, and the events that tell of them.

    A message and a reasoning item have one content part each. An item is open until a part of another kind follows.
    """

    def __init__(self, logprobs: bool) -> None:
        self.items: list[dict[str, Any]] = []  # the closed ones
        self._logprobs = logprobs
        self._kind: str | None = None  # of the open item
        self._id = ""
        self._texts: list[str] = []
        self._entries: list[dict[str, Any]] = []

    def take(self, item: Thought | Piece | ToolCall) -> list[Event]:
        if isinstance(item, ToolCall):
            return self.close("completed") + self._call(item)
        kind = "reasoning" if isinstance(item, Thought) else "message"
        events = [] if kind == self._kind else self.close("completed") + self._open(kind)
        self._texts.append(item.text)
        told: dict[str, Any] = {"delta": item.text}
        if isinstance(item, Piece):
            told["logprobs"] = [chat_logprob(entry) for entry in item.logprobs] if self._logprobs else []
            self._entries += told["logprobs"]
        return [*events, self._of_part(f"response.{PART_TYPES[kind]}.delta", **told)]

    def finish(self, status: str) -> list[Event]:
        """Closes the last item. An answer without any gets an empty message, since clients read the first."""
        opened = [] if self._kind or self.items else self._open("message")
        return opened + self.close(status)

    def close(self, status: str) -> list[Event]:
        """Closes the open item, if there is one."""
        if self._kind is None:
            return []
        kind, text = self._kind, "".join(self._texts)
        done: dict[str, Any] = {"text": text}
        if kind == "message":
            done["logprobs"] = self._entries
        item = self._item(kind, self._id, status, [self._part(kind, text, self._entries)])
        events = [
            self._of_part(f"response.{PART_TYPES[kind]}.done", **done),
            self._of_part("response.content_part.done", part=item["content"][0]),
            self._of_item("done", item),
        ]
        self.items.append(item)
        self._kind = None
        return events

    def _open(self, kind: str) -> list[Event]:
        self._kind, self._id = kind, _new_item_id(kind)
        self._texts, self._entries = [], []
        return [
            self._of_item("added", self._item(kind, self._id, "in_progress", [])),
            self._of_part("response.content_part.added", part=self._part(kind, "", [])),
        ]

    def _call(self, call: ToolCall) -> list[Event]:
        id = _new_item_id("function_call")
        named = {"call_id": call.id, "name": call.name}
        item = {"id": id, "type": "function_call", "status": "completed", "arguments": call.arguments_text, **named}
        place = {"item_id": id, "output_index": len(self.items)}
        arguments = "response.function_call_arguments"
        events = [
            self._of_item("added", item | {"status": "in_progress", "arguments": ""}),
            {"type": f"{arguments}.delta", **place, "delta": call.arguments_text},
            {"type": f"{arguments}.done", **place, "name": call.name, "arguments": call.arguments_text},
            self._of_item("done", item),
        ]
        self.items.append(item)
        return events

    def _of_item(self, what: str, item: dict[str, Any]) -> Event:
        return {"type": f"response.output_item.{what}", "output_index": len(self.items), "item": item}

    def _of_part(self, type: str, **more: Any) -> Event:
        return {"type": type, "item_id": self._id, "output_index": len(self.items), "content_index": 0, **more}

    @staticmethod
    def _item(kind: str, id: str, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        own: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        return {"id": id, "type": kind, "status": status, **own, "content": content}

    @staticmethod
    def _part(kind: str, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        own: dict[str, Any] = {"annotations": [], "logprobs": logprobs} if kind == "message" else {}
        return {"type": PART_TYPES[kind], "text": text, **own}


def _new_item_id(kind: str) -> str:
    return f"{PREFIXES[kind]}_{uuid.uuid4().hex}"


def _usage(end: End) -> dict[str, Any]:
    usage = usage_of([end], 1)
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": usage["completion_tokens_details"],
        "total_tokens": usage["total_tokens"],
    }
