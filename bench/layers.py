"""Measures models whose layers or experts are streamed: speed, bytes, forecast, at shares of the weights in memory.

Every run is a process of its own, in a memory cgroup of its budget where that is possible. Peers that stream a model
from the disk can run beside it, in the same cgroup: Hugging Face's accelerate and llama.cpp.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_flash.cli.run import whole_number
from mlx_flash.errors import FlashError, UsageError

from .tools import subprocess_json
from .tools.cgroup import MemoryGroup, memory_group, run_child
from .tools.report import environment, forget_cached

SHARES = (1.0, 0.6, 0.3)
PROMPT = "Explain how a rainbow forms, in detail."
PEERS = {"accelerate": "accelerate_offload.py", "llama.cpp": "llama_mmap.py"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="checkpoints that are run as they are")
    parser.add_argument(
        "--shares",
        type=lambda text: [float(part) for part in text.split(",")],
        default=SHARES,
        help="comma-separated list of shares of the weights that the budget has room for (default: 1,0.6,0.3)",
    )
    parser.add_argument("--tokens", type=whole_number(2), default=32, help="tokens to generate (default: %(default)s)")
    parser.add_argument(
        "--context", type=whole_number(64), default=512, help="tokens to plan for (default: %(default)s)"
    )
    parser.add_argument(
        "--draft", choices=("none", "ngram"), default="none", help="drafts to verify (default: %(default)s)"
    )
    parser.add_argument("--no-reference", action="store_true", help="do not run mlx-lm with all weights in memory")
    parser.add_argument("--peer-python", type=Path, help="Python with torch, transformers, accelerate, llama_cpp")
    parser.add_argument("--gguf", type=Path, help="the same weights for llama.cpp")


def main(arguments: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    print(f"{'model':<16}{'runtime':<12}{'share':>6}{'MB':>7}{'peak':>7}{'pinned':>8}{'MB/token':>10}{'ms/token':>10}"
          f"{'tokens/s':>10}{'forecast':>10}{'error':>8}{'first s':>9}{'forecast':>9}  text")  # fmt: skip
    for model in arguments.model:
        asked = [str(model), arguments.context]
        sizes = subprocess_json.ask("mlx_flash.bench.layers", ["sizes", *asked], "the plan")
        expected: list[int] | None = None
        if not arguments.no_reference:
            row = _ask(["reference", *asked, None, arguments.tokens, "none"], "mlx-lm", model, None, None)
            expected = row["tokens"]
            _add(rows, row, expected)
        for share in arguments.shares:
            budget = max(sizes["smallest"], sizes["everything"] - int((1 - share) * sizes["weights"]))
            question = ["flash", *asked, budget, arguments.tokens, arguments.draft]
            row = _ask(question, "mlx_flash", model, share, budget)
            made = _ask(["forecast", *asked, budget], "the forecast", model, share, budget)
            row["forecast"] = made if "tokens_per_second" in made else None
            expected = expected or row.get("tokens")
            _add(rows, row, expected)
            for peer in PEERS if arguments.peer_python else ():
                if peer != "llama.cpp" or arguments.gguf is not None:
                    _add(rows, _peer(arguments, peer, model, share, budget), None)
    errors = [abs(row["error"]) for row in rows if row.get("error") is not None]
    if errors:
        print(f"forecast: {len(errors)} runs, errors up to {max(errors):.0%}, median {statistics.median(errors):.0%}")
    print(json.dumps({"command": "layers", "environment": environment(arguments.model[0]), "rows": rows}))


def _ask(question: list[Any], name: str, model: Path, share: float | None, budget: int | None) -> dict[str, Any]:
    row: dict[str, Any] = {"model": model.name, "runtime": name, "share": share, "budget": budget}
    for file in model.glob("*.safetensors"):
        forget_cached(file)
    with _group(budget) as group:
        try:
            row |= subprocess_json.ask("mlx_flash.bench.layers", question, name, group)
        except subprocess_json.KilledError:
            row["killed"] = True
        if group is not None:
            row["cgroup_peak"] = group.peak_bytes()
    return row


def _peer(arguments: argparse.Namespace, peer: str, model: Path, share: float, budget: int) -> dict[str, Any]:
    where = str(arguments.gguf if peer == "llama.cpp" else model)
    script = str(Path(__file__).parent / "baselines" / PEERS[peer])
    row: dict[str, Any] = {"model": model.name, "runtime": peer, "share": share, "budget": budget}
    command = [str(arguments.peer_python), script, where, str(budget), str(arguments.tokens), PROMPT]
    for file in [*model.glob("*.safetensors"), Path(where)]:
        if file.is_file():
            forget_cached(file)
    with _group(budget) as group:
        done = run_child(command) if group is None else group.run(command, dict(os.environ))
        row["killed"] = bool(group and group.kills()) or done.returncode < 0
        if group is not None:
            row["cgroup_peak"] = group.peak_bytes()
    if done.returncode == 0 and done.stdout:
        row |= json.loads(done.stdout.splitlines()[-1])
    elif not row["killed"]:
        row["failed"] = done.returncode
    return row


@contextlib.contextmanager
def _group(budget: int | None) -> Iterator[MemoryGroup | None]:
    """A cgroup of the budget; None without a budget, or where none can be made."""
    with contextlib.ExitStack() as stack:
        group = None
        if budget is not None:
            with contextlib.suppress(UsageError):
                group = stack.enter_context(memory_group(budget))
        yield group


def _add(rows: list[dict[str, Any]], row: dict[str, Any], expected: list[int] | None) -> None:
    if "token_s" in row:
        row["tokens_per_second"] = 1 / row["token_s"]
        if (forecast := row.get("forecast")) is not None:
            row["error"] = forecast["tokens_per_second"] / row["tokens_per_second"] - 1
        row["same_text"] = None if expected is None else row["tokens"] == expected
    rows.append(row)

    def cell(key: str, scale: float = 1.0, digits: int = 0) -> str:
        return "-" if row.get(key) is None else f"{row[key] * scale:.{digits}f}"

    forecast = f"{row['forecast']['tokens_per_second']:.2f}" if row.get("forecast") else "-"
    error = f"{row['error']:+.0%}" if row.get("error") is not None else "-"
    made = row.get("forecast") or {}
    first = f"{made['first_token_s']:.2f}" if made.get("first_token_s") is not None else "-"
    text = {True: "same", False: "other", None: ""}[row.get("same_text")]
    ended = "killed" if row.get("killed") else "failed" if row.get("failed") else text
    share = "-" if row["share"] is None else f"{row['share']:.0%}"
    print(
        f"{row['model']:<16.15}{row['runtime']:<12}{share:>6}{cell('budget', 1e-6):>7}{cell('peak', 1e-6):>7}"
        f"{row.get('pinned', '-'):>8}{cell('bytes', 1e-6, 1):>10}{cell('token_s', 1e3, 1):>10}"
        f"{cell('tokens_per_second', 1, 2):>10}{forecast:>10}{error:>8}"
        f"{cell('first_token_s', 1, 2):>9}{first:>9}  {ended}",
        flush=True,
    )


# -- in the child process ------------------------------------------------------------------------------------


def work(what: str, folder: str, context: int, *rest: Any) -> dict[str, Any]:
    if what == "sizes":
        return sizes_of(folder, context)
    if what == "forecast":
        return forecast(folder, context, *rest)
    budget, tokens, draft = rest
    return reference(folder, tokens) if what == "reference" else flash(folder, context, budget, tokens, draft)


def sizes_of(folder: str, context: int) -> dict[str, Any]:
    """The bytes of a checkpoint's weights, its smallest budget, and the one for all of it."""
    from mlx_flash.loading.in_place_plan import InPlacePlan
    from mlx_flash.loading.load import plan
    from mlx_flash.loading.plan import ENDLESS, RUN_TO_RUN_BYTES

    made = plan(folder, memory=ENDLESS, context=context)
    if not isinstance(made, InPlacePlan):
        raise UsageError(f"--model {folder} is not a checkpoint that is run as it is.")
    smallest = made.smallest + RUN_TO_RUN_BYTES
    return {"weights": made.parameters_bytes, "smallest": smallest, "everything": made.everything}


def forecast(folder: str, context: int, budget: int) -> dict[str, Any]:
    """The forecast as `mlxflash plan` makes it, from a new measurement of the disk; {} if there is none."""
    from mlx_flash.flash.system import peak_memory_bytes
    from mlx_flash.loading.load import planned_model
    from mlx_flash.loading.options import LoadOptions

    with tempfile.TemporaryDirectory() as cache:
        os.environ["MLX_FLASH_CACHE"] = cache
        with planned_model(folder, LoadOptions(memory=budget, context=context)) as planned:
            plan: Any = planned.plan
            prompt = _prompt(planned.tokenizer)
            tokens = len(planned.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)
            made = None if planned.foresight is None else planned.foresight.of(plan, tokens)
    if made is None:
        return {}
    told = {"peak": peak_memory_bytes(), "plan": plan.total, "tokens_per_second": made.tokens_per_second}
    return {**dataclasses.asdict(made), **told}


def flash(folder: str, context: int, budget: int, tokens: int, draft: str) -> dict[str, Any]:
    import mlx_flash
    from mlx_flash.flash.system import peak_memory_bytes

    options: dict[str, Any] = {} if draft == "none" else {"draft": draft}
    model, tokenizer = mlx_flash.load(folder, memory=budget, context=context, trials=False, **options)
    found, times, last = [], [], None
    began = time.perf_counter()
    for last in mlx_flash.stream_generate(model, tokenizer, _prompt(tokenizer), max_tokens=tokens):
        found.append(int(last.token))
        times.append(time.perf_counter())
    if last is None:
        raise FlashError("the model generated no token.")
    result = {
        "tokens": found,
        "token_s": _seconds_per_token(times),
        "first_token_s": times[0] - began,
        "bytes": last.statistics.per_token()["bytes_per_token"],
        "peak": peak_memory_bytes(),
        "plan": model.flash.plan.total,
        "pinned": model.flash.plan.pinned,
        "statistics": last.statistics.per_token(),
    }
    model.flash.close()
    return result


def reference(folder: str, tokens: int) -> dict[str, Any]:
    from mlx_lm import load, stream_generate

    from mlx_flash.flash.system import peak_memory_bytes

    model, tokenizer = load(folder)
    found, times = [], []
    for response in stream_generate(model, tokenizer, _prompt(tokenizer), max_tokens=tokens):
        found.append(int(response.token))
        times.append(time.perf_counter())
    return {"tokens": found, "token_s": _seconds_per_token(times), "peak": peak_memory_bytes()}


def _prompt(tokenizer: Any) -> Any:
    if tokenizer.has_chat_template:
        return tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True)
    return PROMPT


def _seconds_per_token(times: list[float]) -> float:
    """The mean after the first token, whose time is the prompt's."""
    if len(times) < 2:
        raise FlashError("the model ended after one token, which tells nothing about its speed.")
    return (times[-1] - times[0]) / (len(times) - 1)


if __name__ == "__main__":
    subprocess_json.answer(work)
