"""The commands of a chat: their names and what they do."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class ChatCommand:
    """argument: what may follow the name, in square brackets if it may be left out."""

    argument: str
    about: str


COMMANDS = {
    "/retry": ChatCommand("", "answer the last question again"),
    "/continue": ChatCommand("", "continue an answer that was cut or stopped"),
    "/edit": ChatCommand("", "change the last question (in $VISUAL or $EDITOR) and ask it again"),
    "/system": ChatCommand("[TEXT]", "show the system message, or set it; /system off removes it"),
    "/set": ChatCommand("[NAME [VALUE]]", "show all settings, or change one: /set temperature 0.7"),
    "/file": ChatCommand("PATH", "put a text file before your next message; /file off takes it back"),
    "/image": ChatCommand("PATH", "show an image with your next message (start with --images)"),
    "/save": ChatCommand("PATH", "write the conversation into a file"),
    "/load": ChatCommand("PATH", "continue the conversation in a file"),
    "/reset": ChatCommand("", "forget the conversation"),
    "/stats": ChatCommand("", "show speed, cache hits, bytes read, and where the time went"),
    "/memory": ChatCommand("[SIZE]", "show the memory plan; /memory 6GB loads the model again with 6 GB"),
    "/help": ChatCommand("", "show this list"),
    "/quit": ChatCommand("", "leave; so does Ctrl-D"),
}
WITH_PATH = ("/file", "/image", "/save", "/load")
# What other programs call them.
ELSEWHERE = {
    **dict.fromkeys(("/exit", "/bye", "/q"), "/quit"),
    **dict.fromkeys(("/clear", "/new"), "/reset"),
    **dict.fromkeys(("/regenerate", "/again", "/undo"), "/retry"),
    **dict.fromkeys(("/temperature", "/temp", "/params", "/settings"), "/set"),
    **dict.fromkeys(("/?", "/commands"), "/help"),
}
HELP = (
    "\n".join(f"{f'{name} {command.argument}':<20}{command.about}" for name, command in COMMANDS.items())
    + '''
A message of several lines stands between """ and """. A \\ at the end of a line
continues it, and so does Alt-Return. Tab completes commands and paths.
Ctrl-C stops an answer. A line that begins with a space is never a command.'''
)


def nearest(name: str) -> str | None:
    """The command that somebody may have meant."""
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    return next(iter(get_close_matches(name, COMMANDS, 1)), None)
