"""python -m mlx_flash.server: the OpenAI API over a model that streams from the SSD."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, ClassVar

from ..cli import stopping
from ..cli.beginning import TERMINATED, Interrupted, Terminated
from ..cli.model_arguments import add_model_arguments, load_model
from ..cli.run import add_lifeline_argument, obey_lifeline, program, run_command, whole_number
from ..cli.terminal import say
from ..errors import UsageError
from ..loading.plan import parse_memory

if TYPE_CHECKING:
    from .engine import Engine

KEY_VARIABLE = "MLX_FLASH_API_KEY"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("server"),
        description="Serves one model with the OpenAI API, and a page to talk to it. Requests queue; one is worked on "
        "at a time. The address goes to standard output, everything else to standard error. Where a request does not "
        "say temperature, top_p, top_k, min_p or repetition_penalty, the model's generation_config.json does, else "
        "OpenAI's defaults hold (temperature 1).",
    )
    add_model_arguments(parser)
    http = parser.add_argument_group("server")
    http.add_argument(
        "--host", default="127.0.0.1", help="address to bind to (default: %(default)s, this machine only)"
    )
    http.add_argument(
        "--port",
        type=whole_number(0, 65535),
        default=8080,
        metavar="N",
        help="port; 0 takes any free one (default: %(default)s)",
    )
    http.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"what clients must send as a bearer token; needed for any --host but a loopback one (default: "
        f"${KEY_VARIABLE}, which other users of this machine cannot see)",
    )
    add_lifeline_argument(http)
    return parser


class Signals:
    """Ctrl-C or SIGTERM: while the model loads, at once; then the engine ends what it does; a second one insists.

    `code` is the exit code then: that of a server that was told to end is 0.
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
        if self.engine.ready and not insists:
            self.engine.stop()
        elif number == signal.SIGINT:
            raise Interrupted
        else:
            raise Terminated(self.code, number)


def main(arguments: argparse.Namespace) -> int:
    obey_lifeline(arguments)
    key = arguments.api_key if arguments.api_key is not None else os.environ.get(KEY_VARIABLE) or None
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise UsageError("the API key is empty or has characters that a header cannot carry.")
    if arguments.memory is not None:
        parse_memory(arguments.memory)  # what means nothing is refused before a port is open
    from .serving import HttpThread, bind, is_loopback, url_of

    bound = bind(arguments.host, arguments.port)
    if key is None and not is_loopback(bound):
        bound.close()
        raise UsageError(
            f"--host {arguments.host} can be reached from other machines: an API key is needed, --api-key or "
            f"{KEY_VARIABLE}. Without one only 127.0.0.1 is served."
        )
    from ..source.resolve import demo_folder
    from .app import make_app
    from .engine import Engine

    path = arguments.model if arguments.model is not None else str(demo_folder())
    if Path(path).is_dir():
        path = str(Path(path).resolve())
    engine = Engine(arguments.model or "demo", path)
    with HttpThread(make_app(engine, arguments.host, key), bound), Signals(engine) as signals:
        print(f"Serving {engine.name} at {url_of(bound)}", flush=True)
        try:
            engine.run(lambda: load_model(arguments, say))
        except (KeyboardInterrupt, SystemExit):
            if signals.code is None:
                raise
    say("stopped")
    return signals.code or 0


if __name__ == "__main__":
    run_command(make_parser(), main, terminated=Signals.CODES[signal.SIGTERM])
