"""python -m mlx_flash.chat: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys

from .cli.chat_commands import converse
from .cli.chat_input import TypedLines, piped_lines
from .cli.chat_session import Chat
from .cli.command_list import HELP
from .cli.model_arguments import add_model_arguments
from .cli.rank_arguments import add_rank_arguments, ranks_of
from .cli.run import program, run_command
from .cli.terminal import Interrupts, say
from .text.sampling import add_sampling_arguments, check_sampling

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
    add_rank_arguments(parser)
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


def main(arguments: argparse.Namespace) -> int:
    check_sampling(arguments)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with ranks_of(arguments, program("chat")) as group, contextlib.closing(Chat(arguments, group)) as chat:
        if interactive:
            say("Type a message and press Return; /help lists the commands.")
        with Interrupts(AGAIN if interactive else None) as interrupts:
            lines = TypedLines(interrupts) if interactive else piped_lines(interrupts)
            return converse(chat, lines, interrupts, interactive)


if __name__ == "__main__":
    run_command(make_parser(), main)
