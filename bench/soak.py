"""Does the server stay healthy for a long time? Runs mixed clients, and records its memory and every failed request."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import psutil
from tqdm import tqdm

from mlx_flash.cli.run import whole_number
from mlx_flash.defaults import MOST_PARALLEL
from mlx_flash.errors import FlashError, UsageError
from mlx_flash.source.children import child_environment

from .tools import figures
from .tools.report import COLOURS, add_output_argument, environment, finish, require_plots

PATIENCE_S = 300.0  # longest time of a request, including its wait in the queue
SAMPLE_S = 5.0
TEXT = "the sea was dark and old men told of dogs that ran with wolves in the white silence of the north"
Client = Callable[[httpx.Client, random.Random], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=30.0, help="minutes to run for (default: %(default)g)")
    parser.add_argument("--clients", type=int, default=6, help="clients at the same time (default: %(default)s)")
    parser.add_argument("--model", help="model of the server (default: the packaged demo model)")
    parser.add_argument("--memory", metavar="SIZE", help="budget of the server (default: the server's default)")
    parser.add_argument(
        "--parallel", type=whole_number(1, MOST_PARALLEL), help="answers at once (default: the server's default)"
    )
    add_output_argument(parser)


def main(arguments: argparse.Namespace) -> None:
    require_plots()
    if not 0 < arguments.minutes <= 24 * 60:
        raise UsageError(f"--minutes is {arguments.minutes:g}, expected more than 0 and at most 1440.")
    if not 1 <= arguments.clients <= 64:
        raise UsageError(f"--clients is {arguments.clients}, expected 1 to 64, the length of the server's queue.")
    command = [sys.executable, "-m", "mlx_flash.server", "--port", "0", "--exit-with-stdin"]
    for name in ("model", "memory", "parallel"):
        if (value := getattr(arguments, name)) is not None:
            command += [f"--{name}", str(value)]
    with contextlib.ExitStack() as stack:
        pipe = subprocess.PIPE
        server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=child_environment())
        stack.callback(end, server)
        url = wait_until_ready(server)
        result = soak(server, url, arguments)
    result |= {"environment": environment(Path()), "model": arguments.model or "the packaged demo model"}
    finish(arguments.output, "soak", result, lambda figure: draw(figure, result), show=lambda: show(result))


def end(server: subprocess.Popen[str]) -> None:
    server.terminate()
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def wait_until_ready(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    match = re.search(r"at (http://\S+)", server.stdout.readline())
    if match is None:
        raise FlashError("the server did not start (see above).")
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{match[1]}/health").status_code == 200:
                return match[1]
        if server.poll() is not None:
            raise FlashError("the server ended while it loaded the model (see above).")
        time.sleep(0.2)


# -- clients -----------------------------------------------------------------------------------------------------


class Failed(Exception):
    """A request ended in an unexpected way."""


def text(rng: random.Random, most: int) -> str:
    return " ".join(rng.choice(TEXT.split()) for _ in range(rng.randint(1, most)))


def expect(answer: httpx.Response, status: int) -> Any:
    if answer.status_code != status:
        raise Failed(f"{answer.request.url.path}: {answer.status_code}, expected {status}: {answer.text[:200]}")
    return answer.json()


def complete(client: httpx.Client, rng: random.Random) -> None:
    body = {"prompt": text(rng, 200), "max_tokens": rng.randint(1, 40), "temperature": rng.choice((0, 0.8))}
    answer = expect(client.post("/v1/completions", json=body), 200)
    if not answer["usage"]["completion_tokens"]:
        raise Failed("an answer without tokens")


def chat(client: httpx.Client, rng: random.Random) -> None:
    """Streams a chat of three turns. Each turn sends the whole conversation."""
    messages: list[dict[str, str]] = []
    for _ in range(3):
        messages.append({"role": "user", "content": text(rng, 30)})
        body = {"messages": messages, "max_tokens": rng.randint(5, 30), "stream": True}
        said, done = [], False
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                answer.read()
                expect(answer, 200)
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise Failed(f"in a stream: {event['error']}")
                    said += [choice["delta"].get("content") or "" for choice in event["choices"]]
        if not done:
            raise Failed("a stream without an end")
        messages.append({"role": "assistant", "content": "".join(said)})


def leave(client: httpx.Client, rng: random.Random) -> None:
    """Disconnects in the middle of an answer."""
    body = {"prompt": text(rng, 20), "max_tokens": 300, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        for count, _ in enumerate(answer.iter_lines()):
            if count > rng.randint(0, 12):
                return


def misbehave(client: httpx.Client, rng: random.Random) -> None:
    wrong: list[tuple[Any, int]] = [
        (b"{", 400),
        (b'{"prompt": "a", "max_tokens": "many"}', 400),
        (b'{"prompt": "a", "n": 9}', 400),
        (json.dumps({"prompt": "word " * 200_000}).encode(), 400),
    ]
    content, status = rng.choice(wrong)
    expect(client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"}), status)


CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome", "Oslo"]}, "people": {"type": "integer", "minimum": 0}},
    "required": ["city", "people"],
    "additionalProperties": False,
}
TOOL = {"name": "look", "description": "Looks at a city.", "parameters": CITY}


def fits(content: str, reason: str) -> None:
    """Checks an answer that is held to CITY. One that max_tokens cut need not be whole."""
    if reason == "length":
        return
    value = json.loads(content)
    if value.keys() != {"city", "people"} or value["city"] not in ("Paris", "Rome", "Oslo") or value["people"] < 0:
        raise Failed(f"an answer outside of its schema: {content[:200]}")


def structured(client: httpx.Client, rng: random.Random) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    messages = [{"role": "user", "content": text(rng, 30)}]
    body = {"messages": messages, "response_format": schema, "max_tokens": 40, "temperature": rng.choice((0, 1))}
    choice = expect(client.post("/v1/chat/completions", json=body), 200)["choices"][0]
    fits(choice["message"]["content"] or "", choice["finish_reason"])


def call(client: httpx.Client, rng: random.Random) -> None:
    """Forces a tool call, and answers it. A model whose template has no tools refuses."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": text(rng, 30)}]
    body = {"messages": messages, "tools": [{"type": "function", "function": TOOL}], "max_tokens": 60}
    forced = body | {"tool_choice": "required", "parallel_tool_calls": False}
    answer = client.post("/v1/chat/completions", json=forced)
    if answer.status_code == 400 and expect(answer, 400)["error"]["param"] == "tools":
        return
    choice = expect(answer, 200)["choices"][0]
    if choice["finish_reason"] == "tool_calls":
        (made,) = choice["message"]["tool_calls"]
        fits(made["function"]["arguments"], "tool_calls")
        messages += [choice["message"], {"role": "tool", "tool_call_id": made["id"], "content": "It is there."}]
        expect(client.post("/v1/chat/completions", json=body | {"max_tokens": 10}), 200)


def respond(client: httpx.Client, rng: random.Random) -> None:
    """Streams an answer of the Responses API."""
    body = {"input": text(rng, 60), "max_output_tokens": rng.randint(1, 30), "stream": True}
    last = ""
    with client.stream("POST", "/v1/responses", json=body) as answer:
        for line in answer.iter_lines():
            last = line if line.startswith("event: ") else last
    if last not in ("event: response.completed", "event: response.incomplete"):
        raise Failed(f"a response that ended with {last!r}")


def message(client: httpx.Client, rng: random.Random) -> None:
    """Streams an answer of Anthropic's API, and counts the tokens of its prompt."""
    body: dict[str, Any] = {"model": "any", "messages": [{"role": "user", "content": text(rng, 60)}]}
    expect(client.post("/v1/messages/count_tokens", json=body), 200)
    last = ""
    with client.stream(
        "POST", "/v1/messages", json=body | {"max_tokens": rng.randint(1, 30), "stream": True}
    ) as answer:
        for line in answer.iter_lines():
            last = line if line.startswith("event: ") else last
    if last != "event: message_stop":
        raise Failed(f"a message that ended with {last!r}")


def ollama(client: httpx.Client, rng: random.Random) -> None:
    """Streams an answer of Ollama's API."""
    expect(client.get("/api/tags"), 200)
    messages = [{"role": "user", "content": text(rng, 60)}]
    body = {"model": "any", "messages": messages, "options": {"num_predict": rng.randint(1, 30)}}
    with client.stream("POST", "/api/chat", json=body) as answer:
        last = [json.loads(line) for line in answer.iter_lines() if line][-1]
    if not last.get("done"):
        raise Failed(f"a stream that ended with {last}")


def watch(client: httpx.Client, rng: random.Random) -> None:
    """Reads statistics and some events, as the page does."""
    expect(client.get("/stats"), 200)
    if client.get("/metrics").status_code != 200:
        raise Failed("/metrics")
    with contextlib.suppress(httpx.ReadTimeout), client.stream("GET", "/events", timeout=5.0) as events:
        for count, _ in enumerate(events.iter_lines()):
            if count > rng.randint(10, 100):
                return


KINDS: dict[str, tuple[Client, int]] = {  # name -> (client, relative frequency)
    "completion": (complete, 4),
    "chat of three turns": (chat, 4),
    "held to a schema": (structured, 2),
    "tool call and its result": (call, 2),
    "Responses API": (respond, 2),
    "Anthropic's API": (message, 2),
    "Ollama's API": (ollama, 2),
    "client that leaves": (leave, 2),
    "wrong request": (misbehave, 1),
    "statistics and events": (watch, 1),
}


def soak(server: subprocess.Popen[str], url: str, arguments: argparse.Namespace) -> dict[str, Any]:
    done: Counter[str] = Counter()
    failures: list[str] = []
    stopping = threading.Event()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
            while not stopping.is_set():
                name = rng.choices(list(KINDS), [weight for _, weight in KINDS.values()])[0]
                try:
                    KINDS[name][0](client, rng)
                    done[name] += 1
                except (Failed, httpx.HTTPError) as error:
                    failures.append(f"{name}: {type(error).__name__}: {error}")
                stopping.wait(rng.random())

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(arguments.clients)]
    for thread in threads:
        thread.start()
    process = psutil.Process(server.pid)
    samples = []
    began = time.monotonic()
    with tqdm(total=round(60 * arguments.minutes), unit="s", desc="soak", dynamic_ncols=True) as bar:
        while (elapsed := time.monotonic() - began) < 60 * arguments.minutes:
            if server.poll() is not None:
                failures.append(f"the server ended with exit code {server.returncode}")
                break
            samples.append(sample(process, elapsed))
            bar.update(round(elapsed) - bar.n)
            bar.set_postfix_str(f"{sum(done.values())} done, {len(failures)} failed")
            time.sleep(SAMPLE_S)
    stopping.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    after = None
    if server.poll() is None:
        after = httpx.get(f"{url}/stats", timeout=30).json()
    return {
        "minutes": arguments.minutes,
        "clients": arguments.clients,
        "done": dict(done),
        "failures": failures,
        "samples": samples,
        "thirds_bytes": thirds([s["rss_bytes"] for s in samples]),
        "stats": after,
    }


def sample(process: psutil.Process, elapsed: float) -> dict[str, float]:
    with process.oneshot():
        return {
            "elapsed_s": elapsed,
            "rss_bytes": process.memory_info().rss,
            "threads": process.num_threads(),
            "files": process.num_fds(),
        }


def thirds(values: list[float]) -> list[float]:
    """Medians of the first, middle and last third."""
    return [float(np.median(part)) if len(part) else 0.0 for part in np.array_split(values, 3)]


def show(result: dict[str, Any]) -> None:
    figures.table(["clients", "done"], [[name, f"{count:,}"] for name, count in sorted(result["done"].items())])
    print(f"failed: {len(result['failures'])}")
    for failure in result["failures"][:10]:
        print(f"  {failure}")
    sizes = ", ".join(f"{size / 1e6:,.1f}" for size in result["thirds_bytes"])
    last = result["samples"][-1]
    print(
        f"resident memory, median of each third: {sizes} MB\n"
        f"at the end: {last['threads']} threads, {last['files']} files"
    )
    if result["stats"]:
        memory = result["stats"]["memory"]
        print(f"peak {memory['peak_bytes'] / 1e6:,.1f} MB of {memory['budget_bytes'] / 1e6:,.1f} MB planned")


def draw(figure: Any, result: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    minutes = [s["elapsed_s"] / 60 for s in result["samples"]]
    axes.plot(minutes, [s["rss_bytes"] / 1e6 for s in result["samples"]], color=COLOURS["ours"])
    axes.set_ylim(0)
    axes.set_xlabel("minutes")
    axes.set_ylabel("the server's resident memory, MB")
    total = sum(result["done"].values())
    figures.title(
        figure,
        f"{total:,} requests and conversations, {len(result['failures'])} failed",
        f"{result['clients']} mixed clients at a time, {result['model']}",
    )
