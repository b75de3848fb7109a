"""python -m mlx_flash.chat: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .cli.history import History
from .cli.model_arguments import add_model_arguments, load_model
from .cli.run import program, run_command
from .cli.terminal import WITHOUT_TEMPLATE, Interrupts, PromptInterrupted, context_hint, progress_line, say
from .errors import BudgetError, ChatTemplateError, TokenizerError, UsageError
from .flash.stats import Statistics
from .loading.plan import parse_memory
from .source.cached import HISTORY
from .source.resolve import cache_folder
from .text.answer_parts import AnswerFormat, AnswerParts, Part, Text, Thought
from .text.sampling import add_sampling_arguments, check_sampling, make_processors, sampling_of, seeded_sampler

PROMPT = ">>> "
DIM, UNDIM = "\x1b[2m", "\x1b[22m"
HELP = """\
/reset         forget the conversation
/stats         show speed, cache hits, bytes read per token and where the time went: last answer, all answers
/image PATH    show the model an image with your next message (start with --images)
/memory        show the memory plan and the memory in use
/memory 6GB    load the model again with that budget; the conversation stays
/help          show this list
/quit          leave; so does Ctrl-D
Ctrl-C stops an answer. A line that begins with a space is never a command."""
AGAIN = "The answer stops when the current layers are done; press Ctrl-C again to leave the program."


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("chat"),
        description="Holds a conversation with a model that streams from the SSD. If standard input or output is not "
        "a terminal, it answers line by line. Answers go to standard output; thoughts and everything else go to "
        "standard error.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    text = parser.add_argument_group("text")
    add_sampling_arguments(text, max_tokens=256)
    text.add_argument(
        "--image",
        metavar="PATH",
        action="append",
        default=[],
        help="an image that the first message is about; may be given several times; implies --images",
    )
    text.add_argument("--system-prompt", help="system message for the chat template")
    text.add_argument(
        "--ignore-chat-template", action="store_true", help="questions and answers form one continuous text"
    )
    return parser


class Chat:
    """A loaded model, the conversation with it, and the statistics of its answers."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.last: Statistics | None = None
        self.total: Statistics | None = None
        self.answers = 0
        self._cut_before = False  # whether --max-tokens has cut an answer before
        self.pictures: list[Any] = []  # of the next question
        for path in arguments.image:
            self._add_picture(path)
        arguments.images = arguments.images or bool(self.pictures)
        self._load()
        from .text.conversation import Conversation

        self.conversation = Conversation(
            self.tokenizer, self.plan.context, arguments.system_prompt, not arguments.ignore_chat_template
        )
        self.conversation.images = self.model.flash.images
        self.sampling = sampling_of(arguments, self.model.flash.defaults)
        self.sampler = seeded_sampler(self.sampling, self.model.flash.vocabulary)
        if self.model.flash.defaults.sampling:
            say(f"sampling: {self.sampling.describe()} (options not given are from the model's generation_config.json)")
        if not self.conversation.has_template:
            if arguments.system_prompt is not None:
                say("note: --system-prompt is not used without a chat template")
            if not arguments.ignore_chat_template:
                say("note: this model has no chat template: your messages and its replies form one continuous text")

    @property
    def plan(self) -> Any:
        return self.model.flash.plan

    def _add_picture(self, path: str) -> None:
        from .text.images import read_image

        self.pictures.append(read_image(path))

    def _load(self) -> None:
        self.model: Any
        self.tokenizer: Any
        self.model, self.tokenizer = load_model(self.arguments, say)
        from .text.prompt_cache import ReusedPromptCache

        self.format = AnswerFormat(self.tokenizer)
        self.turns: Any = ReusedPromptCache(self.model)

    def close(self) -> None:
        self.conversation.close()
        self._close_model()

    def _close_model(self) -> None:
        if self.model is not None:  # None: it could not be loaded again
            self.model.flash.close()

    # -- a question ------------------------------------------------------------------------------------------

    def answer(self, question: str, interrupts: Interrupts) -> None:
        """Prints the answer while it is generated.

        Raises UsageError, ChatTemplateError or TokenizerError for a question that cannot be used.
        """
        room = min(self.arguments.max_tokens, self.plan.context // 4)
        pictures, self.pictures = self.pictures, []
        prompt = self.conversation.ask(question, room, pictures)
        if prompt.dropped:
            say(
                f"note: the context of {self.plan.context} tokens is full: dropped the oldest {_turns(prompt.dropped)} "
                f"({prompt.dropped_tokens} tokens), kept {_turns(len(self.conversation.turns))}"
            )
        shown = _Shown(self.format.begin(prompt.tokens) if self.conversation.has_template else None)
        made: list[int] = []
        response: Any = None
        responses = self.turns.stream_generate(
            self.tokenizer,
            prompt.tokens,
            self.arguments.max_tokens,
            system_tokens=prompt.system_tokens,
            seen=prompt.seen,
            sampler=self.sampler,
            logits_processors=make_processors(self.sampling, lambda: prompt.tokens[: self.turns.reused]),
            prompt_progress_callback=progress_line(interrupts),
        )
        with shown, contextlib.closing(responses), contextlib.suppress(PromptInterrupted):  # type: ignore[type-var]
            for response in responses:
                shown.add(response.text)
                made.append(response.token)
                if interrupts.asked:
                    break
        if response is None:
            say("stopped while reading the prompt; your question was dropped")
            return
        shown.finish(whole=response.finish_reason == "stop")
        self.conversation.answered(question, shown.text, made, pictures)
        self._count(response.statistics)
        if interrupts.asked:
            say("stopped")
        elif response.finish_reason == "length":
            self._say_cut(len(made))

    def _count(self, statistics: Statistics) -> None:
        self.last = statistics
        self.total = statistics if self.total is None else self.total + statistics
        self.answers += 1

    def _say_cut(self, made: int) -> None:
        if made < self.arguments.max_tokens:
            say(
                f"note: the context of {self.plan.context} tokens is full, so the answer ends here. The next question "
                f"drops the oldest turns; /reset drops all of them. {context_hint(self.model)}"
            )
        elif not self._cut_before:
            self._cut_before = True
            say(f"note: answers end after {made} tokens (--max-tokens)")

    # -- commands --------------------------------------------------------------------------------------------

    def command(self, line: str) -> bool:
        """Runs a command line such as "/stats"; False means leave. Raises UsageError for an unknown command."""
        name, *rest = line.split()
        if name == "/memory" and len(rest) <= 1:
            self.reload(rest[0]) if rest else self.say_memory()
        elif rest and name in ("/reset", "/stats", "/memory", "/help", "/quit"):
            raise UsageError(f"{name} takes {'one size' if name == '/memory' else 'no argument'}.")
        elif name == "/image":
            path = line.removeprefix(name).strip()
            if not path:
                raise UsageError("/image takes the path of an image.")
            self._add_picture(path)
            say(f"your next message is about {len(self.pictures)} image{'s' * (len(self.pictures) > 1)}")
        elif name == "/reset":
            self.conversation.forget()
            self.turns.forget()
            say("the conversation is forgotten")
        elif name == "/stats":
            self.say_statistics()
        elif name == "/help":
            say(HELP)
        elif name == "/quit":
            return False
        else:
            raise UsageError(
                f"there is no command {name}; /help lists them. To send it as a message, start the line with a space."
            )
        return True

    def say_statistics(self) -> None:
        if self.last is None or self.total is None:
            say("no answers yet")
        else:
            self._say_of("last answer", self.last)
            self._say_of("total of one answer" if self.answers == 1 else f"total of {self.answers} answers", self.total)
        say(self._memory_now())
        slots = f"slots for {self.plan.slot_share:.0%} of the {self.plan.units.name}"
        say(f"plan: {self.plan.total / 1e9:.3f} GB, {slots} (/memory shows all of it)")

    def _say_of(self, what: str, statistics: Statistics) -> None:
        seconds = statistics.decode.total_s
        say(
            f"{what}: {statistics.decoded_tokens} tokens in {seconds:.1f} s, "
            f"{statistics.decoded_tokens / seconds:.1f} tokens-per-sec; "
            f"to the first token: {statistics.first_token_s:.3f} s"
        )
        for line in statistics.lines(self.model.flash.predictor):
            say(f"  {line}")

    def say_memory(self) -> None:
        say(self.plan.describe())
        say(self._memory_now())

    def _memory_now(self) -> str:
        from .flash.system import current_memory_bytes, peak_memory_bytes

        now, peak = current_memory_bytes() / 1e9, peak_memory_bytes() / 1e9
        return (
            f"now: {now:.3f} GB of {self.plan.budget / 1e9:.3f} GB, peak {peak:.3f} GB; "
            f"{_turns(len(self.conversation.turns))}, {len(self.turns.tokens)} of {self.plan.context} tokens of context"
        )

    def reload(self, memory: str) -> None:
        """Loads the model again with another budget, or with the old one if the new one is too small.

        The conversation stays; its KV cache does not. Raises UsageError for a text that is not a size.
        """
        parse_memory(memory)
        before, self.arguments.memory = self.arguments.memory, memory
        self._free()
        try:
            self._load()
        except BudgetError as refused:
            say(f"{refused} Loading it with the old budget.")
            self.arguments.memory = before
            try:
                self._load()
            except BudgetError as grown:  # the process has grown a little since it began
                self.arguments.memory = grown.smallest_bytes
                self._load()
        self.conversation.tokenizer, self.conversation.context = self.tokenizer, self.plan.context
        self.conversation.images = self.model.flash.images

    def _free(self) -> None:
        """Frees the old model. The next plan counts the memory that this process then uses."""
        import mlx.core as mx

        from .flash.system import return_freed_memory

        self._close_model()
        self.model = self.tokenizer = self.turns = self.conversation.tokenizer = self.conversation.images = None
        gc.collect()
        mx.clear_cache()
        return_freed_memory()


class _Shown:
    """Prints an answer while it is generated. Thoughts go to standard error, dimmed on a terminal.

    As a context, it leaves the terminal undimmed after an error.
    """

    def __init__(self, parts: AnswerParts | None) -> None:
        """parts: None for an answer that is one text."""
        self._parts = parts
        self._thinking = False
        self.text = ""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self._end_thoughts()

    def add(self, text: str) -> None:
        if self._parts is None:
            self._print(text)
        else:
            self._show(self._parts.feed(text))

    def finish(self, whole: bool) -> None:
        """Ends the answer and its line. whole: whether the model itself ended it."""
        if self._parts is not None:
            self._show(self._parts.finish(whole))
        self._end_thoughts()
        print(flush=True)

    def _show(self, parts: list[Part]) -> None:
        for part in parts:
            if isinstance(part, Text):
                self._end_thoughts()
                self._print(part.text)
            elif isinstance(part, Thought):
                if not self._thinking:
                    self._thinking = True
                    self._think(DIM if sys.stderr.isatty() else "")
                self._think(part.text)

    def _end_thoughts(self) -> None:
        if self._thinking:
            self._thinking = False
            self._think(f"{UNDIM if sys.stderr.isatty() else ''}\n\n")

    def _print(self, text: str) -> None:
        self.text += text
        print(text, end="", flush=True)

    def _think(self, text: str) -> None:
        with contextlib.suppress(OSError):  # Thoughts that cannot be shown must not stop the answer.
            print(text, end="", file=sys.stderr, flush=True)


def _turns(count: int) -> str:
    return f"{count} turn" if count == 1 else f"{count} turns"


def history_file() -> Path:
    try:
        return cache_folder() / HISTORY
    except UsageError:  # There is no home folder; a model named by its folder needs none.
        return Path(os.devnull)


def typed(interrupts: Interrupts) -> Iterator[str]:
    """Yields lines from the terminal until Ctrl-D."""
    history = History(history_file())
    while True:
        try:
            with interrupts.raising():
                line = input(PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if not history.typed_so_far():
                say("/quit or Ctrl-D leaves the program")
        except UnicodeDecodeError:
            say("that is not valid UTF-8 text.")
        else:
            history.add(line)
            yield line


def piped(interrupts: Interrupts) -> Iterator[str]:
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    while True:
        with interrupts.raising():
            line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\r\n")


def main(arguments: argparse.Namespace) -> int:
    check_sampling(arguments)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    chat = Chat(arguments)
    if interactive:
        say("Type a message and press Return; /help lists the commands.")
    try:
        with Interrupts(AGAIN if interactive else None) as interrupts:
            return converse(chat, typed(interrupts) if interactive else piped(interrupts), interrupts, interactive)
    finally:
        chat.close()


def _check_text(line: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError:  # Bytes that are not text arrive as lone surrogates.
        raise UsageError("that is not valid UTF-8 text.") from None


def converse(chat: Chat, lines: Iterator[str], interrupts: Interrupts, interactive: bool) -> int:
    """Answers each line until they end; returns the exit code.

    A session that is not interactive returns the code of the last line that could not be used: it cannot be retyped.
    """
    unused = 0
    for line in lines:
        interrupts.renew()
        try:
            _check_text(line)
            if not line.startswith("/"):
                if line.strip():
                    chat.answer(line.strip(), interrupts)
            elif not chat.command(line):
                break
        except (UsageError, ChatTemplateError, TokenizerError) as error:
            say(f"{error} {WITHOUT_TEMPLATE}" if isinstance(error, ChatTemplateError) else str(error))
            unused = error.exit_code
        if interrupts.asked and not interactive:
            return 130
    return 0 if interactive else unused


if __name__ == "__main__":
    run_command(make_parser(), main)
