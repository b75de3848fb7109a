"""The server's arguments, and what is checked of them before a port is opened."""

from __future__ import annotations

import argparse
import json
import os
import re
from typing import Any

from ..cli.model_arguments import add_model_arguments, options_of
from ..cli.rank_arguments import add_rank_arguments
from ..cli.run import add_lifeline_argument, whole_number
from ..defaults import KEY_VARIABLE, MOST_PARALLEL
from ..errors import UsageError
from ..text.chat_template import RESERVED_VARIABLES
from .access import Access

DESCRIPTION = (
    "Serves a model with the APIs of OpenAI, Anthropic and Ollama, and a page to chat in. Requests "
    "wait in a queue; one is answered at a time, or several with --parallel. The address goes to standard output, "
    "everything else to standard error. If a request does not set temperature, top_p, top_k, min_p or "
    "repetition_penalty, the value comes from the model's generation_config.json, else from OpenAI's defaults "
    "(temperature 1)."
)


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_rank_arguments(parser)
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
        help="token that clients must send, as a bearer token or as x-api-key; required unless --host is a loopback "
        f"address (default: ${KEY_VARIABLE}, which other users of this machine cannot see)",
    )
    http.add_argument(
        "--name",
        action="append",
        default=[],
        help="name of the model in the API, may be given several times: the first one is in the answers (default: the "
        "last part of the folder's path, or the Hugging Face id)",
    )
    http.add_argument(
        "--strict-names",
        action="store_true",
        help="refuse requests that name a model which is not in the list (default: every such name stands for the "
        "loaded model)",
    )
    http.add_argument(
        "--idle-unload",
        type=_duration,
        metavar="TIME",
        help="close the model after this time without requests, such as 90s, 15m or 2h, and give its memory back; the "
        "next request loads it again (default: keep it loaded)",
    )
    http.add_argument(
        "--parallel",
        type=whole_number(1, MOST_PARALLEL),
        default=1,
        metavar="N",
        help=f"requests that are answered at once, at most {MOST_PARALLEL}: they share the reads of layers and "
        "experts, and the plan has a KV cache of --context tokens for each; with more than 1, an answer may depend on "
        "what else is served (default: %(default)s)",
    )
    http.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of another origin use the server, such as http://localhost:3000, app://obsidian.md, "
        "vscode-webview://*, null, or * for all; may be given several times (default: none)",
    )
    http.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="further name that clients may call the server by, such as host.docker.internal; may be given several "
        "times (default: only those of this machine)",
    )
    http.add_argument(
        "--disk-cache",
        default="auto",
        metavar="SIZE",
        help="most bytes of the cache folder that keep contexts of conversations for when memory has no room for them "
        "and for the next start, such as 5GB; 0 for none; auto for 2 GB, at most a tenth of the free disk (default: "
        "%(default)s)",
    )
    add_lifeline_argument(http)
    answers = parser.add_argument_group("answers")
    answers.add_argument(
        "--chat-template-args",
        metavar="JSON",
        type=_json_object,
        default={},
        help="variables for the chat template where a request sets none, such as '{\"enable_thinking\": false}'",
    )
    answers.add_argument(
        "--thinking-budget",
        metavar="N",
        type=whole_number(0, 10**9),
        help="most tokens of an answer's thoughts where a request sets no limit; then they are ended and the answer "
        "begins (default: no limit)",
    )


def _duration(text: str) -> float:
    """Seconds of "90s", "15m" or "2h". Raises ArgumentTypeError."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)([smh])", text.strip())
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a time such as 90s, 15m or 2h")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def _json_object(text: str) -> dict[str, Any]:
    """The object in a JSON text. Raises ArgumentTypeError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a JSON object, such as '{{\"enable_thinking\": false}}'")
    if taken := RESERVED_VARIABLES & value.keys():
        raise argparse.ArgumentTypeError(f"it may not have {min(taken)}, which the server sets")
    return value


def given_key(arguments: argparse.Namespace) -> str | None:
    """The API key of the arguments or the environment."""
    return arguments.api_key if arguments.api_key is not None else os.environ.get(KEY_VARIABLE) or None


def checked(arguments: argparse.Namespace) -> tuple[Access, int | None]:
    """(who may call, bytes of the disk cache or None for its default). Raises UsageError for an invalid value."""
    access = Access(
        arguments.host,
        given_key(arguments),
        tuple(arguments.allow_host),
        tuple(arguments.allow_origin),
        tuple(arguments.name),
        arguments.strict_names,
    )
    access.check()
    options_of(arguments).check()
    from ..loading.plan import parse_memory

    on_disk = None if arguments.disk_cache == "auto" else 0
    if arguments.disk_cache not in ("auto", "0"):
        on_disk = parse_memory(arguments.disk_cache, "disk_cache")
    return access, on_disk


def require_key(arguments: argparse.Namespace, loopback: bool) -> None:
    """Raises UsageError for an address that other machines reach, without a key."""
    if given_key(arguments) is None and not loopback:
        raise UsageError(
            f"--host {arguments.host} can be reached from other machines, so an API key is required. Give one with "
            f"--api-key or {KEY_VARIABLE}, or use --host 127.0.0.1."
        )
