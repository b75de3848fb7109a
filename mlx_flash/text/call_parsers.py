"""What mlx-lm's parsers of tool calls lack: a limit on their time, and a notion of calls that have not ended yet."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

from .tool_formats import FORMATS, OPTIONAL_NEWLINE, Format

SECONDS = 1.0  # for one call

Parser = Callable[[str, list[dict[str, Any]]], Any]


_now = threading.local()  # deadline: of this thread's call


class _Expression:
    """A regular expression that raises TimeoutError at a deadline, and lets other threads run meanwhile."""

    def __init__(self, pattern: Any) -> None:
        self._pattern = pattern

    def __getattr__(self, method: str) -> Callable[..., Any]:
        left = max(1e-3, getattr(_now, "deadline", time.monotonic() + SECONDS) - time.monotonic())

        def search(*arguments: Any, **options: Any) -> Any:
            return getattr(self._pattern, method)(*arguments, **options, concurrent=True, timeout=left)

        return search


def limited(parser: Parser) -> Parser:
    """The parser with a limit of SECONDS.

    Some of mlx-lm's regular expressions take minutes for 30,000 characters that begin a call again and again. They are
    replaced in their module: no other thread could run while they search.
    """
    import regex

    module = parser.__globals__  # type: ignore[attr-defined]
    for name, value in list(module.items()):
        if isinstance(value, regex.Pattern):
            module[name] = _Expression(value)

    def parse(text: str, tools: list[dict[str, Any]]) -> Any:
        _now.deadline = time.monotonic() + SECONDS
        try:
            return parser(text, tools)
        finally:
            del _now.deadline

    return parse


def unfinished(format: str, call: str) -> bool:
    """Whether the text of a call ends inside one of its arguments: then an end marker in it is a part of that argument.

    format: the name of mlx-lm's parser; "" for arguments that are JSON.
    """
    form = FORMATS.get(format)
    if form is not None:
        return _ends_inside(form, call)
    try:
        json.loads(call.strip())
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        pass
    return False


def _ends_inside(form: Format, call: str) -> bool:
    if form.quotes[0]:
        return call.count(form.quotes[0]) % 2 == 1
    opening, closing = form.before.split("{key}")[0], form.after.strip(OPTIONAL_NEWLINE + "\n")
    if form.cdata and call.rfind("<![CDATA[") > call.rfind("]]>"):
        return True
    return bool(closing) and call.rfind(opening) > call.rfind(closing)
