"""Divides an answer into its parts, while it is generated: thoughts, text and tool calls.

The markers and the parsers of calls are the tokenizer's own, as mlx-lm knows them. Markers are found in the text, not
among token ids, since a tokenizer may join the end of a marker with what follows it. No part of a marker, and no part
of a call, is ever passed on as text.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .stops import StopWords

TEXT, THOUGHT, CALL, HEADER = "normal", "reasoning", "tool", "header"  # the names of mlx-lm's states
BODY = "body"  # of a harmony message; its header says which kind of part it is
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")  # gpt-oss
RECIPIENT = "to=functions."
OPENING_TOKENS = 11  # A prompt that opens the thoughts does so within so many tokens of its end.


@dataclass(frozen=True)
class Thought:
    """A piece of the model's thoughts."""

    text: str


@dataclass(frozen=True)
class Text:
    """A piece of the answer's text. start: the index of its first character in all that the model has said."""

    text: str
    start: int = 0


@dataclass(frozen=True)
class ToolCall:
    """A whole tool call. id: unique within a conversation."""

    name: str
    arguments: dict[str, Any]
    id: str

    @property
    def arguments_text(self) -> str:
        """The arguments as JSON."""
        return json.dumps(self.arguments, ensure_ascii=False)


Part = Thought | Text | ToolCall


class AnswerFormat:
    """How one model marks the parts of its answers. Made once per tokenizer (mlx-lm's TokenizerWrapper)."""

    def __init__(self, tokenizer: Any) -> None:
        from .call_parsers import limited, unfinished  # They import mlx-lm.

        self.tokenizer = tokenizer
        self.harmony = _knows(tokenizer, HARMONY)
        self.thinks = self.harmony or bool(tokenizer.has_thinking) or THOUGHT in self._states()
        self.calls_tools = self.harmony or bool(tokenizer.has_tool_calling)
        parser = tokenizer.tool_parser if tokenizer.has_tool_calling else None
        self.parser_name = "" if self.harmony or parser is None else parser.__module__.rpartition(".")[2]
        self.parse_call: Any = None if parser is None else limited(parser)
        self.is_unfinished = unfinished

    def _states(self) -> set[str]:
        return {state for edges in self.tokenizer.response_transitions.values() for _, state in edges}

    @property
    def closes_thoughts(self) -> list[int]:
        """The token ids that end the thoughts and begin the text; empty if they are not known."""
        if self.harmony:
            closing = "<|end|><|start|>assistant<|channel|>final<|message|>"
            return [int(token) for token in self.tokenizer.encode(closing, add_special_tokens=False)]
        return list(self.tokenizer.think_end_tokens or ()) if self.tokenizer.has_thinking else []

    def transitions(self, tools: bool) -> dict[str, list[tuple[str, str]]]:
        """State -> (marker, next state). tools: whether tool calls are looked for."""
        if self.harmony:
            ends = [(end, HEADER) for end in ("<|end|>", "<|call|>", "<|return|>", "<|start|>")]
            return {HEADER: [("<|message|>", BODY)], BODY: ends}
        known = self.tokenizer
        found: dict[str, list[tuple[str, str]]] = {TEXT: [], THOUGHT: [], CALL: []}
        if known.has_thinking:
            found[TEXT].append((known.think_start, THOUGHT))
            found[THOUGHT].append((known.think_end, TEXT))
        own = CALL in self._states()  # The model's own states say where calls begin.
        if known.has_tool_calling and (tools or own):
            if not own:
                found[TEXT].append((known.tool_call_start, CALL))
            if known.has_thinking:
                found[THOUGHT].append((known.tool_call_start, CALL))
            if known.tool_call_end:
                found[CALL].append((known.tool_call_end, TEXT))
        found[TEXT] += [(marker, TEXT) for marker in known.structural_markers]
        for state, edges in known.response_transitions.items():
            found.setdefault(state, []).extend(edges)
        return found

    def first_state(self, prompt: Sequence[int], continues: bool) -> str:
        """The state that an answer to this prompt begins in. continues: whether the prompt ends inside the answer."""
        known = self.tokenizer
        if self.harmony:
            return BODY if continues else HEADER
        if known.has_thinking and prompt:
            opened, closed = known.rfind_think_start(prompt), known.rfind_think_end(prompt)
            after = opened + len(known.think_start_tokens)
            # A marker further back is one that somebody wrote about.
            if opened > closed and (continues or len(prompt) - after < OPENING_TOKENS):
                inside = known.decode(list(prompt[after:]))
                if continues or not inside.strip():
                    return THOUGHT
        return TEXT if continues else known.response_initial_state or TEXT

    def begin(
        self,
        prompt: Sequence[int] = (),
        *,
        tools: list[dict[str, Any]] | None = None,
        one_call: bool = False,
        stop: Sequence[str] = (),
        continues: bool = False,
    ) -> AnswerParts:
        """The parts of one answer.

        prompt: its token ids. tools: those that may be called, in OpenAI's form. one_call: whether the answer ends
        after one call. stop: words that end the text. continues: whether the prompt ends inside the answer.
        """
        state = self.first_state(prompt, continues)
        within = continues and state == THOUGHT
        return AnswerParts(self, state, _complete(tools or []), one_call, stop, within)


class AnswerParts:
    """The parts of one answer. `feed` takes its text piece by piece, cut anywhere."""

    def __init__(
        self,
        format: AnswerFormat,
        state: str,
        tools: list[dict[str, Any]],
        one_call: bool,
        stop: Sequence[str],
        within: bool = False,
    ) -> None:
        """within: whether the answer begins within thoughts, so that white space at its beginning belongs to them."""
        from mlx_lm.generate import TextStateMachine

        self.format, self.tools, self.one_call = format, tools, one_call
        self._edges = format.transitions(bool(tools))
        self._machine = TextStateMachine(self._edges)
        self._state = self._machine.make_state(state)
        self._said = ""  # all text so far
        self._header = ""  # of a harmony message
        self._call_start = 0  # index in _said of the marker that begins the call, or of the white space before it
        self._from_thought = False  # whether the call began inside the thoughts
        self._call = ""
        self._kind = self._kind_of(state)
        self._text = _Trimmed(drops_first=False, holds_last=any(self._edges.values()))
        self._thought = _Trimmed(drops_first=not within, holds_last=True)
        self._stop = StopWords(stop)
        self._at = 0  # index in _said of the next character that becomes text
        self.calls = 0

    @property
    def kind(self) -> str:
        """The kind of part that the next character belongs to: TEXT, THOUGHT, CALL, or HEADER for none of them."""
        return self._kind

    @property
    def said(self) -> int:
        """The number of characters that the model has said."""
        return len(self._said)

    @property
    def stopped(self) -> str | None:
        """The stop word that ended the text."""
        return self._stop.found

    @property
    def ended(self) -> bool:
        """Whether the answer ends here, whatever the model says next."""
        return self.stopped is not None or (self.one_call and self.calls > 0)

    def feed(self, text: str) -> list[Part]:
        """The parts that are known now."""
        parts: list[Part] = []
        for character in text:  # One at a time, so that the place of each marker is known.
            if self.ended:
                break
            self._said += character
            before = self._state[0]
            self._state, segments = self._machine.split(self._state, character)
            read = len(self._said) - len(self._state[3])
            if len(segments) == 1:
                self._take(segments[0][1], read - len(segments[0][1]), parts)
                continue
            waiting = segments[0][1]
            ends = [len(marker) for marker, _ in self._edges[before] if self._said.endswith(marker, 0, read)]
            place = read - max(ends)
            self._take(waiting, place - len(waiting), parts)
            self._pass(self._state[0], place, parts)
        return _joined(parts)

    def finish(self, whole: bool) -> list[Part]:
        """The parts held back until now. whole: whether the model itself ended the answer."""
        parts: list[Part] = []
        if not self.ended:
            self._state, rest, _ = self._machine.flush(self._state)
            self._take(rest, len(self._said) - len(rest), parts)
            if self._kind == CALL:
                self._end_call(parts, cut=not whole, marked=False)
        text = self._text.feed(self._stop.finish()) + self._text.finish()
        if text:
            parts.append(Text(text, self._at))
        return _joined(parts)

    # -- one step --------------------------------------------------------------------------------------------

    def _take(self, text: str, start: int, parts: list[Part]) -> None:
        """Takes text of the current kind, without markers. start: its index in what the model has said."""
        if not text:
            return
        if self._kind == HEADER:
            self._header += text
        elif self._kind == CALL:
            self._call += text
        elif self._kind == THOUGHT:
            if shown := self._thought.feed(text):
                parts.append(Thought(shown))
        else:
            taken = self._text.skip(text)
            if taken and not self._stop.held and not self._text.held:
                self._at = start + len(text) - len(taken)
            self._show(self._text.feed(self._stop.feed(taken)), parts)
            if self.stopped is not None:
                self._show(self._text.finish(), parts)

    def _show(self, text: str, parts: list[Part]) -> None:
        if text:
            parts.append(Text(text, self._at))
            self._at += len(text)

    def _pass(self, state: str, marker_start: int, parts: list[Part]) -> None:
        """Passes a marker, into `state`."""
        before, kind = self._kind, self._kind_of(state)
        space = ""  # before the marker; it is dropped unless the marker turns out to be text
        if before == CALL:
            if self.format.is_unfinished(self.format.parser_name, self._call):  # The marker is a part of an argument.
                self._state = self._machine.make_state(BODY if self.format.harmony else CALL)
                self._call += self._said[marker_start:]
                return
            self._kind = kind
            self._end_call(parts, cut=False, marked=True)
        elif before == TEXT:
            self._show(self._text.feed(self._stop.finish()), parts)
            if kind == TEXT:
                self._show(self._text.finish(), parts)
            else:
                space = self._text.finish()
                self._text = _Trimmed(drops_first=True, holds_last=True)
        if before in (THOUGHT, HEADER) and kind not in (THOUGHT, HEADER):
            self._text.drops_first = True
        if before == THOUGHT and kind != THOUGHT:
            space = self._thought.finish()
            self._thought = _Trimmed(drops_first=True, holds_last=True)
        if kind == CALL:
            self._call, self._call_start, self._from_thought = "", marker_start - len(space), before == THOUGHT
        if before != CALL:
            self._kind = kind
        if kind == HEADER:
            self._header = ""

    def _kind_of(self, state: str) -> str:
        """The kind of part in a state of the machine."""
        if state == BODY:
            if RECIPIENT in self._header:
                return CALL
            return THOUGHT if "analysis" in self._header else TEXT
        return state

    def _end_call(self, parts: list[Part], *, cut: bool, marked: bool) -> None:
        """Ends a call: passes it on, or its raw text if it cannot be understood.

        cut: whether the answer was cut inside it. marked: whether its end was marked.
        """
        calls = None if cut else self._understood(marked)
        if calls is not None:
            self.calls += len(calls)
            parts.extend(calls[:1] if self.one_call else calls)
            self._text = _Trimmed(drops_first=True, holds_last=True)
            return
        raw = self._call if self.format.harmony else self._said[self._call_start :]
        if self._from_thought:
            if marked:  # The thoughts continue.
                self._state, self._kind = self._machine.make_state(THOUGHT), THOUGHT
                self._thought.drops_first = False
            parts.append(Thought(raw))
        else:
            self._at = self._call_start
            self._show(raw, parts)
            self._text.drops_first = False

    def _understood(self, marked: bool) -> list[ToolCall] | None:
        """The calls in the text of one; None if it cannot be understood."""
        if not self.tools:
            return None
        try:
            if self.format.harmony:
                name = self._header.split(RECIPIENT, 1)[1].split()[0].split("<|")[0]
                found: Any = {"name": name, "arguments": json.loads(self._call)}
            else:
                found = self.format.parse_call(self._call.rstrip(), self.tools)
            calls = [_call(each) for each in (found if isinstance(found, list) else [found])]
        except Exception:  # The parsers raise errors of many kinds.
            return None
        known = {tool["function"]["name"] for tool in self.tools}
        # A call without its end mark may be a part of one. The mark of some models is empty.
        sure = marked or not self.format.tokenizer.tool_call_end or self.format.harmony
        return calls if calls and (sure or all(call.name in known for call in calls)) else None


class _Trimmed:
    """Passes text on without the white space at its ends.

    drops_first: whether white space at the beginning is dropped. holds_last: whether white space at the end is held
    back until more text follows.
    """

    def __init__(self, drops_first: bool, holds_last: bool) -> None:
        self.drops_first, self.holds_last = drops_first, holds_last
        self.held = ""

    def skip(self, text: str) -> str:
        """The text without the white space that is dropped at the beginning."""
        if self.drops_first:
            text = text.lstrip()
            self.drops_first = not text
        return text

    def feed(self, text: str) -> str:
        text = self.held + self.skip(text)
        shown = text.rstrip() if self.holds_last else text
        self.held = text[len(shown) :]
        return shown

    def finish(self) -> str:
        """Ends the text. Returns the white space that was held back."""
        held, self.held = self.held, ""
        return held


def _call(found: Any) -> ToolCall:
    """The call that a parser of mlx-lm has found. Raises an error of any kind if it is not one."""
    name, arguments = found["name"], found.get("arguments", {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not name.strip() or not isinstance(arguments, dict):
        raise ValueError(f"this is not a tool call: {found!r:.200}")
    # A Python literal may be a set, or infinite; an escape may be half of a character.
    json.dumps([name, arguments], allow_nan=False, ensure_ascii=False).encode()
    given = found.get("id")
    return ToolCall(name.strip(), arguments, given if isinstance(given, str) and given else new_call_id())


def _complete(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools with parameters that have an object for each property, which some of mlx-lm's parsers expect."""
    found = []
    for tool in tools:
        parameters = tool["function"].get("parameters") or {"type": "object"}
        given = parameters.get("properties")
        properties = (
            {key: schema if isinstance(schema, dict) else {} for key, schema in given.items()}
            if isinstance(given, dict)
            else {}
        )
        found.append(tool | {"function": tool["function"] | {"parameters": parameters | {"properties": properties}}})
    return found


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _joined(parts: list[Part]) -> list[Part]:
    """The parts, with neighbours of one kind joined."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, Text) and isinstance(last, Text) and last.start + len(last.text) == part.start:
            joined[-1] = Text(last.text + part.text, last.start)
        elif isinstance(part, Thought) and isinstance(last, Thought):
            joined[-1] = Thought(last.text + part.text)
        else:
            joined.append(part)
    return joined


def _knows(tokenizer: Any, tokens: Sequence[str]) -> bool:
    """Whether each of these texts is a token of its own."""
    vocabulary = tokenizer.get_vocab()
    return all(token in vocabulary for token in tokens)
