"""A conversation in a file, in the form that the server's page exports and imports: JSON with a name and a version.

The page's files may have several chats, and branches where a question was asked again. Here a file has one chat, and
the branch is read that the page showed last.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..text.conversation import Turn
from .text_file import begin_of, in_fence

FORMAT, VERSION = "mlx_flash chats", 1
MOST_BYTES = 500_000_000  # as on the page, whose files may have images
TITLE_CHARACTERS = 60


@dataclass(frozen=True)
class SavedChat:
    """system: the system message, or None. unanswered: the last question if it has no answer.

    images: how many were left out.
    """

    system: str | None
    turns: list[Turn]
    unanswered: str | None = None
    images: int = 0


def write_chat(path: Path, system: str | None, turns: Sequence[Turn], model: str) -> None:
    """Writes the conversation, beside the path first. Only the user can read the file. Raises OSError.

    Images are left out.
    """
    now = int(time.time() * 1000)  # in milliseconds
    messages: list[dict[str, Any]] = []

    def add(**fields: Any) -> None:
        parent = messages[-1]["id"] if messages else None
        messages.append({"id": uuid.uuid4().hex, "parent": parent, "at": now, **fields})

    for turn in turns:
        add(role="user", content=turn.question)
        add(
            role="assistant", content=turn.answer, model=model, **({"thoughts": turn.thoughts} if turn.thoughts else {})
        )
    first = (turns[0].question.strip() if turns else "").partition("\n")[0]
    title = first if len(first) <= TITLE_CHARACTERS else f"{first[: TITLE_CHARACTERS - 1]}…"
    chat = {"id": uuid.uuid4().hex, "title": title, "system": system or "", "created": now, "updated": now}
    chats = [{**chat, "leaf": messages[-1]["id"] if messages else None, "messages": messages}]
    text = json.dumps({"format": FORMAT, "version": VERSION, "chats": chats}, ensure_ascii=False, indent=1)
    descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # with mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(f"{text}\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise


def read_chat(path: Path) -> SavedChat:
    """The conversation in a file. Raises UsageError for one that cannot be read, or of another form."""
    content = begin_of(path, MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise UsageError(f"{path} has more than {MOST_BYTES / 1e6:.0f} MB, the most for a conversation.")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a saved conversation: it is not JSON ({error}).") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UsageError(f'{path} is not a saved conversation: expected "format": "{FORMAT}".')
    if found.get("version") != VERSION:
        raise UsageError(
            f"{path} has version {found.get('version')!r} of the form, expected {VERSION}. Was it saved by a newer "
            "version of this program?"
        )
    chats = found.get("chats")
    if not isinstance(chats, list) or len(chats) != 1 or not isinstance(chats[0], dict):
        count = len(chats) if isinstance(chats, list) else "no list of"
        raise UsageError(f"{path} has {count} chats, expected one. Export a single chat from the page.")
    return _conversation(path, chats[0])


def _conversation(path: Path, chat: dict[str, Any]) -> SavedChat:
    system = _text(chat.get("system") or "")
    if system is None:
        raise UsageError(f"{path} is damaged: its system message is not a text.")
    turns: list[Turn] = []
    question: str | None = None
    images = 0
    for number, message in enumerate(_branch(path, chat), 1):
        role, content, thoughts = message.get("role"), _content(message), _text(message.get("thoughts") or "")
        if content is None or thoughts is None:
            raise UsageError(f"{path} is damaged: message {number} is not a text.")
        if role != ("user" if question is None else "assistant"):
            raise UsageError(f"{path}, message {number}: the role is {role!r}; questions and answers must alternate.")
        images += len(given) if isinstance(given := message.get("images"), list) else 0
        if question is None:
            question = content
        else:
            turns.append(Turn(question, content, [], (), thoughts))
            question = None
    return SavedChat(system or None, turns, question, images)


def _branch(path: Path, chat: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages that lead to the chat's leaf."""
    messages, before = chat.get("messages"), dict[str, dict[str, Any]]()
    for message in messages if isinstance(messages, list) else [None]:
        fields: dict[str, Any] = message if isinstance(message, dict) else {}
        name, parent = fields.get("id"), fields.get("parent")
        if (
            not isinstance(name, str)
            or name in before
            or not (parent is None or (isinstance(parent, str) and parent in before))
        ):
            raise UsageError(f"{path} is damaged: expected a list of messages, each after the one that it follows.")
        before[name] = fields
    found: list[dict[str, Any]] = []
    name = chat.get("leaf")
    while name is not None:
        if not isinstance(name, str) or name not in before:
            raise UsageError(f"{path} is damaged: it does not say which message is the last.")
        found.append(before[name])
        name = before[name].get("parent")
    return found[::-1]


def _content(message: dict[str, Any]) -> str | None:
    """A message's text, after those of its files. None if one of them is not a text."""
    files = message.get("files") or []
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        return None
    parts = [_text(part) for file in files for part in (file.get("name"), file.get("text"))]
    content = _text(message.get("content"))
    if content is None or None in parts:
        return None
    named = zip(parts[::2], parts[1::2], strict=True)
    return "\n\n".join([*(in_fence(str(name), str(text)) for name, text in named), content])


def _text(value: Any) -> str | None:
    """The value if it is a text, without half characters, which JSON can write; else None."""
    with suppress(UnicodeEncodeError):
        return value if isinstance(value, str) and value.encode() is not None else None
    return None
