"""Runs the commands of a chat, and the chat itself: line by line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import ChatTemplateError, TokenizerError, UsageError
from .chat_input import TypedLines
from .chat_session import Chat, turns
from .command_list import COMMANDS, HELP, nearest
from .printable import printable
from .terminal import WITHOUT_TEMPLATE, Interrupts, keys_unseen, say
from .text_file import path_of

NONE = "off"  # removes the system message, or the files that wait for the next message


class ChatCommands:
    """The commands for one chat. typed: where a user is asked; None if nobody can be."""

    def __init__(self, chat: Chat, interrupts: Interrupts, typed: TypedLines | None) -> None:
        self._chat, self._interrupts, self._typed = chat, interrupts, typed
        self._actions: dict[str, Callable[[str], None]] = {
            "/retry": self._retry,
            "/continue": self._continue,
            "/edit": self._edit,
            "/system": self._system,
            "/set": self._set,
            "/file": self._file,
            "/image": self._image,
            "/save": self._save,
            "/load": self._open,
            "/reset": self._reset,
            "/stats": lambda _: chat.say_statistics(),
            "/memory": self._memory,
            "/help": lambda _: say(HELP),
        }

    def run(self, line: str) -> bool:
        """Runs a line such as "/stats"; False means leave. Raises UsageError for one that cannot be run."""
        name, *rest = line.split(maxsplit=1)
        argument = rest[0].strip() if rest else ""
        if name not in COMMANDS:
            near = nearest(name)
            raise UsageError(
                f"there is no command {name}; {f'did you mean {near}? ' if near else ''}/help lists them. To send it "
                "as a message, start the line with a space."
            )
        takes = COMMANDS[name].argument
        if argument and not takes:
            raise UsageError(f"{name} takes no argument.")
        if not argument and takes and not takes.startswith("["):
            raise UsageError(f"{name} takes a path: {name} {takes}.")
        if name == "/quit":
            return False
        self._actions[name](argument)
        return True

    # -- the last question -----------------------------------------------------------------------------------

    def _retry(self, _: str) -> None:
        chat = self._chat
        if chat.asked is not None and chat.asked.answered:
            if chat.sampling.greedy:
                say("note: the temperature is 0, so the answer will be the same; /set temperature 0.7 changes that")
            elif chat.sampling.seed is not None:
                say("note: a seed is set, so the answer may be the same; /set seed random changes that")
        with keys_unseen():
            chat.answer_again(self._interrupts)

    def _continue(self, _: str) -> None:
        with keys_unseen():
            self._chat.continue_answer(self._interrupts)

    def _edit(self, _: str) -> None:
        if self._typed is None:
            raise UsageError("/edit needs a terminal.")
        asked = self._chat.asked
        before = asked.text if asked is not None else ""
        after = self._typed.edited(before)
        if after is None or not after.strip() or after.strip() == before.strip():
            say("the question is unchanged" if before else "there is no question")
            return
        self._interrupts.renew()
        with keys_unseen():
            if asked is None:
                self._chat.answer(after.strip(), self._interrupts)
            else:
                self._chat.answer_again(self._interrupts, after.strip())

    # -- settings --------------------------------------------------------------------------------------------

    def _system(self, text: str) -> None:
        conversation = self._chat.conversation
        if not conversation.has_template:
            raise UsageError("this model is used without a chat template, which has no place for a system message.")
        if not text:
            now = conversation.system_prompt
            say("there is no system message; /system TEXT sets one" if now is None else printable(now))
            return
        conversation.system_prompt = None if text == NONE else text
        what = "the system message is removed" if text == NONE else "the system message is set"
        if conversation.turns:
            what += "; the conversation continues, and is read again with your next message"
        say(what)

    def _set(self, argument: str) -> None:
        settings = self._chat.settings
        if not argument:
            say(settings.table())
            return
        name, _, value = argument.partition(" ")
        if not value.strip():
            say(settings.line(name))
            return
        say(settings.set(name, value.strip()))
        self._chat.use_settings()

    # -- files -----------------------------------------------------------------------------------------------

    def _file(self, argument: str) -> None:
        if argument == NONE:
            self._chat.files, self._chat.pictures = [], []
            say("no file and no image goes with your next message")
            return
        path = path_of(argument)
        count = self._chat.add_file(path)
        others = len(self._chat.files) - 1
        also = f", after {others} other file{'s' * (others > 1)}" if others else ""
        say(f"{printable(path.name)} ({count} tokens) goes before your next message{also}")

    def _image(self, argument: str) -> None:
        self._chat.add_picture(path_of(argument))
        count = len(self._chat.pictures)
        say(f"your next message is about {count} image{'s' * (count > 1)}")

    def _save(self, argument: str) -> None:
        from .saved_chat import write_chat

        chat, path = self._chat, path_of(argument)
        kept = chat.conversation.turns
        if not kept:
            raise UsageError("there is nothing to save yet.")
        if path.is_dir():
            raise UsageError(f"{path} is a folder; expected the name of a file.")
        if path.exists() and not self._agrees(f"{path} exists. Replace it?", f"{path} exists and is not replaced."):
            say("nothing was saved")
            return
        system = chat.conversation.system_prompt if chat.conversation.has_template else None
        try:
            write_chat(path, system, kept, Path(chat.arguments.model or "demo").name)
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror or error}.") from None
        chat.saved = True
        images = any(turn.pictures for turn in kept)
        say(f"{turns(len(kept))} saved in {path}{', without the images' if images else ''}")

    def _open(self, argument: str) -> None:
        from .saved_chat import read_chat

        chat, path = self._chat, path_of(argument)
        found = read_chat(path)
        now = chat.conversation.turns
        asked = f"The conversation of {turns(len(now))} is not saved. Replace it?"
        if not chat.saved and self._typed is not None and not self._typed.agrees(asked):
            say("nothing was loaded")
            return
        chat.replay(found.turns, found.system, found.unanswered)
        without = f", without {found.images} image{'s' * (found.images > 1)}" if found.images else ""
        say(f"{turns(len(found.turns))} loaded{without}; your next message continues the conversation")
        if found.system is not None and not chat.conversation.has_template:
            say("note: its system message is not used without a chat template")
        if found.unanswered is not None:
            say("its last question has no answer; /retry answers it")

    def _agrees(self, question: str, refusal: str) -> bool:
        """The user's answer. Raises UsageError with the refusal if nobody can be asked."""
        if self._typed is None:
            raise UsageError(refusal)
        return self._typed.agrees(question)

    # -- the rest --------------------------------------------------------------------------------------------

    def _reset(self, _: str) -> None:
        self._chat.forget()
        say("the conversation is forgotten")

    def _memory(self, size: str) -> None:
        if len(size.split()) > 1:
            raise UsageError("/memory takes one size.")
        self._chat.reload(size) if size else self._chat.say_memory()


def _check_text(line: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError:  # Bytes that are not text arrive as lone surrogates.
        raise UsageError("that is not valid UTF-8 text.") from None


def converse(chat: Chat, lines: Iterable[str], interrupts: Interrupts, interactive: bool) -> int:
    """Answers each line until they end; returns the exit code.

    A session that is not interactive returns the code of the last line that could not be used: it cannot be retyped.
    """
    commands = ChatCommands(chat, interrupts, lines if isinstance(lines, TypedLines) else None)
    unused = 0
    for line in lines:
        interrupts.renew()
        try:
            _check_text(line)
            if not line.startswith("/"):
                if line.strip():
                    with keys_unseen():
                        chat.answer(line.strip(), interrupts)
            elif not commands.run(line):
                break
        except (UsageError, ChatTemplateError, TokenizerError) as error:
            say(f"{error} {WITHOUT_TEMPLATE}" if isinstance(error, ChatTemplateError) else str(error))
            unused = error.exit_code
        if interrupts.asked and not interactive:
            return 130
    return 0 if interactive else unused
