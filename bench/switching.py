"""Does a server that changes its models under load lose an answer, or its budget? And how long does a change take?

Clients ask models in turn, at random. The server's own model is the packaged demo; the others are given folders.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import httpx2 as httpx
import psutil

from mlx_flash.cli.run import whole_number
from mlx_flash.errors import FlashError, UsageError
from mlx_flash.source.children import child_environment

from .soak import PATIENCE_S, Failed, end, expect, text, wait_until_ready
from .tools import figures
from .tools.report import COLOURS, add_output_argument, environment, finish, require_plots

SAMPLE_S = 0.1
OWN, OWNER = "demo", "local"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a model beside the demo")
    parser.add_argument("--memory", metavar="SIZE", default="1GB", help="budget of the server (default: %(default)s)")
    number = whole_number(1, 10_000)
    parser.add_argument("--switches", type=number, default=20, help="changes of the model (default: %(default)s)")
    parser.add_argument(
        "--clients", type=whole_number(1, 64), default=4, help="clients at the same time (default: %(default)s)"
    )
    add_output_argument(parser)


def main(arguments: argparse.Namespace) -> None:
    require_plots()
    names = [OWN, *(f"{OWNER}/{folder.resolve().name}" for folder in arguments.folders)]
    if len({*names}) < len(names):
        raise UsageError(f"two models have the same name ({', '.join(names)}). Rename a folder.")
    command = [sys.executable, "-m", "mlx_flash.server", "--port", "0", "--exit-with-stdin"]
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(_hub_of(arguments.folders))
        pipe = subprocess.PIPE
        server = subprocess.Popen(
            [*command, "--memory", arguments.memory],
            stdin=pipe,
            stdout=pipe,
            text=True,
            env=child_environment(HF_HUB_CACHE=str(hub)),
        )
        stack.callback(end, server)
        url = wait_until_ready(server)
        result = _Switching(server, url, arguments).run()
    result |= {"clients": arguments.clients, "models": names, "environment": environment(Path())}
    finish(arguments.output, "switching", result, lambda figure: _draw(figure, result), show=lambda: _show(result))


@contextlib.contextmanager
def _hub_of(folders: list[Path]) -> Iterator[Path]:
    """A cache of the Hub with links to the folders."""
    with tempfile.TemporaryDirectory() as made:
        for folder in folders:
            if not (folder / "config.json").is_file():
                raise UsageError(f"{folder} has no config.json. Give folders of checkpoints.")
            repository = Path(made) / f"models--{OWNER}--{folder.resolve().name}"
            for part in ("refs", "snapshots"):
                (repository / part).mkdir(parents=True)
            (repository / "refs" / "main").write_text("0")
            (repository / "snapshots" / "0").symlink_to(folder.resolve())
        yield Path(made)


class _Switching:
    def __init__(self, server: subprocess.Popen[str], url: str, arguments: argparse.Namespace) -> None:
        self.url, self.clients, self.switches = url, arguments.clients, arguments.switches
        self.process = psutil.Process(server.pid)
        self.stopping = threading.Event()
        self.answers = 0
        self.failures: list[str] = []
        self.seconds: list[tuple[str, float]] = []  # of each load: (model, seconds)
        self.samples: list[tuple[float, int]] = []  # (seconds since the beginning, bytes)

    def run(self) -> dict[str, Any]:
        with httpx.Client(base_url=self.url, timeout=PATIENCE_S) as client:
            names = self._wait_for_plans(client)
            budget = client.get("/library").json()["budget_bytes"]
            began = time.monotonic()
            helpers = [threading.Thread(target=self._watch_loads, daemon=True)]
            helpers.append(threading.Thread(target=self._sample, args=(began,), daemon=True))
            workers = [threading.Thread(target=self._ask, args=(seed, names)) for seed in range(self.clients)]
            for thread in (*helpers, *workers):
                thread.start()
            for worker in workers:
                worker.join()
            took = time.monotonic() - began
            before = client.get("/stats").json()
            client.post("/library/unload", json={})
            while (after := client.get("/stats").json())["state"] != "unloaded":
                time.sleep(0.05)
            self.stopping.set()
            helpers[1].join()
        return {
            "switches": before["library"]["loads"] - 1,
            "answers": self.answers,
            "failures": self.failures,
            "took_s": took,
            "load_s": self.seconds,
            "budget_bytes": budget,
            "peak_bytes": after["memory"]["peak_bytes"],
            "unloaded_bytes": after["memory"]["current_bytes"],
            "samples": self.samples,
        }

    def _wait_for_plans(self, client: httpx.Client) -> list[str]:
        """The names of the models, once all are planned. Raises FlashError if one does not fit."""
        while True:
            models = client.get("/library").json()["models"]
            refused = {model["name"]: model["reason"] for model in models if not model["runs"]}
            if not refused:
                return [model["name"] for model in models]
            if not any("looked at" in reason for reason in refused.values()):
                raise FlashError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
            time.sleep(0.5)

    def _ask(self, seed: int, names: list[str]) -> None:
        """One client: asks a model at random, until there were enough switches."""
        rng = random.Random(seed)
        with httpx.Client(base_url=self.url, timeout=PATIENCE_S) as client:
            while client.get("/stats").json()["library"]["loads"] <= self.switches:
                name = rng.choice(names)
                try:
                    self._expect_answer_of(name, client, rng)
                    self.answers += 1
                except (Failed, httpx.HTTPError) as error:
                    self.failures.append(f"{name}: {type(error).__name__}: {error}")

    def _expect_answer_of(self, name: str, client: httpx.Client, rng: random.Random) -> None:
        body = {"model": name, "prompt": text(rng, 40), "max_tokens": 8, "stream": rng.random() < 0.5}
        if not body["stream"]:
            said = expect(client.post("/v1/completions", json=body), 200)["model"]
        else:
            with client.stream("POST", "/v1/completions", json=body) as answer:
                lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
            if lines[-1:] != ["data: [DONE]"]:
                raise Failed(f"a stream that ended with {lines[-1:]}")
            said = json.loads(lines[0].removeprefix("data: "))["model"]
        if said != name:
            raise Failed(f"{said} answered")

    def _watch_loads(self) -> None:
        """Notes how long each load takes, from the end of the answers before it until the model is ready."""
        with httpx.Client(base_url=self.url, timeout=PATIENCE_S) as client, client.stream("GET", "/events") as events:
            began, last = 0.0, ""
            for line in events.iter_lines():
                if not line.startswith("data: ") or '"stage"' not in line:
                    continue
                event = json.loads(line.removeprefix("data: "))
                if event["state"] == "loading" != last:
                    began = time.monotonic()
                elif event["state"] == "ready" and last == "loading":
                    self.seconds.append((event["name"], time.monotonic() - began))
                last = event["state"]

    def _sample(self, began: float) -> None:
        while not self.stopping.wait(SAMPLE_S):
            self.samples.append((time.monotonic() - began, self.process.memory_info().rss))


def _show(result: dict[str, Any]) -> None:
    rows = []
    for name in result["models"]:
        times = [seconds for loaded, seconds in result["load_s"] if loaded == name]
        if times:
            rows.append([name, str(len(times)), f"{median(times):.2f}", f"{max(times):.2f}"])
    figures.table(["model", "loads", "median, s", "longest, s"], rows)
    budget = result["budget_bytes"]
    print(
        f"{result['switches']} switches, {result['answers']} answers by the right model, {len(result['failures'])} lost"
        f" or wrong, {result['took_s']:.0f} s"
    )
    print(
        f"memory: at most {result['peak_bytes'] / 1e6:.0f} MB ({result['peak_bytes'] / budget:.0%} of the budget), "
        f"{result['unloaded_bytes'] / 1e6:.0f} MB after the last model was closed"
    )
    for failure in result["failures"][:10]:
        print(failure)


def _draw(figure: Any, result: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    axes.plot([at for at, _ in result["samples"]], [size / 1e6 for _, size in result["samples"]], color=COLOURS["ours"])
    axes.axhline(result["budget_bytes"] / 1e6, color=COLOURS["ceiling"], linestyle="--")
    axes.set_ylim(0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("memory of the server, MB (dashed: the budget)")
    share = result["peak_bytes"] / result["budget_bytes"]
    figures.title(
        figure,
        f"{result['switches']} changes of the model take {share:.0%} of the budget",
        f"{result['clients']} clients, {result['answers']} answers, {len(result['failures'])} lost or wrong",
    )
