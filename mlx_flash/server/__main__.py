"""python -m mlx_flash.server: the APIs of OpenAI, Anthropic and Ollama over a model that streams from the SSD."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar

from ..cli import stopping
from ..cli.beginning import TERMINATED, Interrupted, Terminated
from ..cli.model_arguments import options_of
from ..cli.rank_arguments import ranks_of
from ..cli.run import obey_lifeline, program, run_command
from ..cli.terminal import say
from ..errors import UsageError
from .access import ALL, model_name
from .arguments import DESCRIPTION, add_server_arguments, checked, require_key

if TYPE_CHECKING:
    from .engine import Engine


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program("server"), description=DESCRIPTION)
    add_server_arguments(parser)
    return parser


class Signals:
    """Handles Ctrl-C and SIGTERM. While a model loads, they end the server at once.

    Later, the first one asks the engine to stop, and a second one ends the server at once. `code` is then the exit
    code: 130 after Ctrl-C, 0 after SIGTERM.
    """

    CODES: ClassVar = {signal.SIGINT: 130, signal.SIGTERM: TERMINATED["server"]}

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.code: int | None = None

    def __enter__(self) -> Signals:
        self._previous = {number: signal.signal(number, self._handle) for number in self.CODES}
        stopping.set_codes(self.CODES)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        insists, self.code = self.code is not None, self.CODES[signal.Signals(number)]
        if self.engine.stoppable and not insists:
            self.engine.stop()
        elif number == signal.SIGINT:
            raise Interrupted
        else:
            raise Terminated(self.code, number)


def main(arguments: argparse.Namespace) -> int:
    obey_lifeline(arguments)
    access, on_disk = checked(arguments)  # Refuse an invalid value before a port is opened.
    if on_disk == 0:
        arguments.warm_start = False  # Then nothing of what the model was asked is kept.
    from .serving import HttpThread, bind, is_loopback, url_of

    bound = bind(arguments.host, arguments.port)
    try:
        require_key(arguments, is_loopback(bound))
    except UsageError:
        bound.close()
        raise
    from ..source.resolve import demo_folder
    from .app import make_app
    from .engine import Engine
    from .library import Library

    path = arguments.model if arguments.model is not None else str(demo_folder())
    if Path(path).is_dir():
        path = str(Path(path).resolve())
    engine = Engine(access.names[0] if access.names else model_name(arguments.model), path)
    engine.idle_unload_s = arguments.idle_unload
    engine.switch.files_of = lambda model: _conversation_files(model, on_disk)
    engine.template_variables, engine.thinking_tokens = arguments.chat_template_args, arguments.thinking_budget
    if ALL in access.origins and access.key is None:
        say("note: with --allow-origin '*' and without a key, every web page that you open can use this server")
    names = tuple(dict.fromkeys((engine.name, *access.names)))
    library = Library(engine, names, arguments.model, options_of(arguments), say)
    with (
        ranks_of(arguments, program("server"), engine.abandon) as group,
        closing(library),
        HttpThread(make_app(engine, access, library), bound),
        Signals(engine) as signals,
    ):
        if group is not None:
            library.group = group
        _tell_address(f"Serving {engine.name} at {url_of(bound)}")
        try:
            engine.run(library.load_own)
        except (KeyboardInterrupt, SystemExit):
            if signals.code is None:
                raise
    say("stopped")
    return signals.code or 0


def _tell_address(text: str) -> None:
    """Prints a line. A full disk behind standard output, as a service's log may be on, must not end the server."""
    try:
        print(text, flush=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # What is buffered would fail again at exit.


def _conversation_files(model: Any, most_bytes: int | None) -> Any:
    from ..loading.conversation_key import conversation_files

    return conversation_files(model, most_bytes, say)


if __name__ == "__main__":
    run_command(make_parser(), main, terminated=Signals.CODES[signal.SIGTERM])
