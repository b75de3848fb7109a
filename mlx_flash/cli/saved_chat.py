"""A conversation in a file: JSON that names its form and version. The server's page exports and imports the same."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..text.conversation import Turn
from .text_file import begin_of

FORMAT, VERSION = "mlx_flash-chat", 1
MOST_BYTES = 64 << 20
TITLE_CHARACTERS = 60


@dataclass(frozen=True)
class SavedChat:
    """system: the system message, or None. unanswered: the last question if it has no answer."""

    system: str | None
    turns: list[Turn]
    unanswered: str | None = None


def write_chat(path: Path, system: str | None, turns: Sequence[Turn], model: str) -> None:
    """Writes the conversation, beside the path first. Only the user can read the file. Raises OSError.

    Images are left out.
    """
    messages: list[dict[str, str]] = []
    for turn in turns:
        messages.append({"role": "user", "content": turn.question})
        thoughts = {"thoughts": turn.thoughts} if turn.thoughts else {}
        messages.append({"role": "assistant", "content": turn.answer, **thoughts})
    first = (turns[0].question.strip() if turns else "").partition("\n")[0]
    title = first if len(first) <= TITLE_CHARACTERS else f"{first[: TITLE_CHARACTERS - 1]}…"
    form = {"format": FORMAT, "version": VERSION, "title": title, "model": model, "system": system or ""}
    text = json.dumps({**form, "messages": messages}, ensure_ascii=False, indent=1)
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
        raise UsageError(f"{path} has more than {MOST_BYTES >> 20} MiB, the most for a conversation.")
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
    return _conversation(path, found)


def _conversation(path: Path, found: dict[str, Any]) -> SavedChat:
    system, messages = _text(found.get("system") or ""), found.get("messages")
    if system is None or not isinstance(messages, list):
        raise UsageError(f"{path} is damaged: expected a system message and a list of messages.")
    turns: list[Turn] = []
    question: str | None = None
    for number, message in enumerate(messages, 1):
        fields = message if isinstance(message, dict) else {}
        role, content, thoughts = fields.get("role"), _text(fields.get("content")), _text(fields.get("thoughts") or "")
        if content is None or thoughts is None:
            raise UsageError(f"{path}, message {number}: expected an object with texts.")
        if role != ("user" if question is None else "assistant"):
            raise UsageError(f"{path}, message {number}: the role is {role!r}; questions and answers must alternate.")
        if question is None:
            question = content
        else:
            turns.append(Turn(question, content, [], (), thoughts))
            question = None
    return SavedChat(system or None, turns, question)


def _text(value: Any) -> str | None:
    """The value if it is a text, without half characters, which JSON can write; else None."""
    with suppress(UnicodeEncodeError):
        return value if isinstance(value, str) and value.encode() is not None else None
    return None
