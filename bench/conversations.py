"""How long do conversations in turn wait for their first token? Beside one alone, and without prompt caches.

Each conversation begins with a long text of its own, and each of its turns sends all of it, as chat programs do. One
server keeps several conversations (--prompt-cache), the other only the last one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx2 as httpx

from mlx_flash.cli.run import whole_number
from mlx_flash.source.children import child_environment

from .soak import PATIENCE_S, TEXT, end, wait_until_ready
from .tools import figures
from .tools.report import COLOURS, add_output_argument, environment, finish, require_plots

WAYS = ("one conversation", "in turn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="model of the servers (default: the packaged demo model)")
    parser.add_argument("--memory", metavar="SIZE", help="budget of each server (default: the server's default)")
    number = whole_number(2, 100)
    parser.add_argument("--conversations", type=number, default=2, help="how many take turns (default: %(default)s)")
    parser.add_argument("--turns", type=number, default=8, help="turns of each conversation (default: %(default)s)")
    parser.add_argument(
        "--words", type=whole_number(1, 100_000), default=200, help="words of the first message (default: %(default)s)"
    )
    add_output_argument(parser)


def main(arguments: argparse.Namespace) -> None:
    require_plots()
    servers = {"several kept": "auto", "the last one kept": "0"}
    times = {name: _first_tokens(arguments, caches) for name, caches in servers.items()}
    medians = {name: {way: median(values) for way, values in of.items()} for name, of in times.items()}
    result: dict[str, Any] = {
        "conversations": arguments.conversations,
        "turns": arguments.turns,
        "words": arguments.words,
        "first_token_s": times,
        "median_s": medians,
        "ratio": {name: of["in turn"] / of["one conversation"] for name, of in medians.items()},
        "environment": environment(Path()),
        "model": arguments.model or "the packaged demo model",
    }
    finish(arguments.output, "conversations", result, lambda figure: _draw(figure, result), show=lambda: _show(result))


def _first_tokens(arguments: argparse.Namespace, caches: str) -> dict[str, list[float]]:
    """Seconds to the first token of every turn but a conversation's first, by way."""
    command = [sys.executable, "-m", "mlx_flash.server", "--port", "0", "--exit-with-stdin", "--prompt-cache", caches]
    for name in ("model", "memory"):
        if (value := getattr(arguments, name)) is not None:
            command += [f"--{name}", value]
    with contextlib.ExitStack() as stack:
        pipe = subprocess.PIPE
        server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=child_environment())
        stack.callback(end, server)
        url = wait_until_ready(server)
        client = stack.enter_context(httpx.Client(base_url=url, timeout=PATIENCE_S))
        rng = random.Random(1)
        alone = [_Talk(client, rng, arguments.words) for _ in range(arguments.conversations)]
        taking_turns = [_Talk(client, rng, arguments.words) for _ in range(arguments.conversations)]
        one = [talk.turn() for talk in alone for _ in range(arguments.turns)]
        turns = [talk.turn() for _ in range(arguments.turns) for talk in taking_turns]
    firsts = range(0, len(one), arguments.turns)
    return {
        "one conversation": [value for place, value in enumerate(one) if place not in firsts],
        "in turn": turns[arguments.conversations :],
    }


class _Talk:
    """One conversation."""

    def __init__(self, client: httpx.Client, rng: random.Random, words: int) -> None:
        self.client, self.rng = client, rng
        self.messages = [{"role": "user", "content": self._text(words)}]

    def _text(self, words: int) -> str:
        return " ".join(self.rng.choice(TEXT.split()) for _ in range(words))

    def turn(self) -> float:
        """Asks and is answered. Returns the seconds to the first token."""
        body = {"messages": self.messages, "max_tokens": 3, "temperature": 0, "stream": True}
        began, first, said = time.perf_counter(), 0.0, ""
        with self.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    text = choice["delta"].get("content") or ""
                    if text and not first:
                        first = time.perf_counter() - began
                    said += text
        self.messages += [{"role": "assistant", "content": said}, {"role": "user", "content": self._text(3)}]
        return first or time.perf_counter() - began


def _show(result: dict[str, Any]) -> None:
    rows = [
        [name, *(f"{1e3 * of[way]:,.0f}" for way in WAYS), f"{result['ratio'][name]:.2f}"]
        for name, of in result["median_s"].items()
    ]
    figures.table(["server", *(f"{way}, ms" for way in WAYS), "ratio"], rows)
    print("medians of the time to the first token, without the first turn of each conversation")


def _draw(figure: Any, result: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    for place, of in enumerate(result["first_token_s"].values()):
        for step, way in enumerate(WAYS):
            at = place + 0.3 * step
            axes.plot([at] * len(of[way]), of[way], "o", alpha=0.5, color=COLOURS["ours" if step else "compute"])
    axes.set_xticks([0, 0.3, 1, 1.3], [f"{name},\n{way}" for name in result["first_token_s"] for way in WAYS])
    axes.set_ylim(0)
    axes.set_ylabel("seconds to the first token")
    ratio = result["ratio"]["several kept"]
    figures.title(
        figure,
        f"In turn, a conversation waits {ratio:.2f} times as long as alone",
        f"{result['conversations']} conversations, {result['words']} words at the beginning, {result['model']}",
    )
