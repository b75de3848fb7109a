"""The process of one run, so that its memory is counted apart. `runs_apart` starts it.

The first line of standard input is a request in JSON: {"work": a name in WORK, ...}. Standard output gets lines of
JSON, each as soon as it is known; {"error", "kind"} is the last one if an error ends the work. The process ends when
its input does.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

Told = dict[str, Any]


def main() -> None:
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever a library prints must not stand between the lines.
    request = json.loads(sys.stdin.buffer.readline())
    from ..cli.stopping import end_with_stdin

    end_with_stdin()
    for told in work(request):
        lines.write(json.dumps(told) + "\n")
        lines.flush()


def work(request: Told) -> Iterator[Told]:
    """What the request asks for, line by line."""
    from ..errors import FlashError
    from ..source.failures import foreseen

    try:
        yield from WORK[request["work"]](request)
    except FlashError as error:
        yield {"error": str(error), "kind": type(error).__name__}
    except Exception as error:  # whatever a library raises on a machine that its authors did not have
        yield {"error": foreseen(error) or f"{type(error).__name__}: {error}"[:300], "kind": type(error).__name__}


def examine(request: Told) -> Iterator[Told]:
    """request: "model", "context". Yields {"folder"} when the model is here, then the dict of `examined`."""
    from ..cli.terminal import say
    from .measured_model import examined, made_ready

    folder = made_ready(request["model"], say)
    yield {"folder": str(folder)}
    yield examined(request["model"], Path(folder), request["context"])


def run(request: Told) -> Iterator[Told]:
    """request: "model", "memory" (bytes), "context", "prompt_tokens", "tokens", "answer_s" (most seconds of an answer
    after its first token), "left_s" (of the whole run).

    Yields {"load_s", "planned_bytes", "slot_share"}, then for each answer the fields of `ReportedAnswer`,
    "ids", "energy" and "choices".
    """
    began = time.monotonic()
    from ..loading.load import load
    from .measured_model import prompt_of, within

    model, tokenizer = within(
        request["memory"],
        lambda memory: load(request["model"], memory=memory, context=request["context"], fetch=False),
    )
    plan = model.flash.plan
    tokenizer.eos_token_ids = []  # Every answer is to have the same number of tokens.
    yield {"load_s": time.monotonic() - began, "planned_bytes": plan.total, "slot_share": plan.slot_share}
    prompt = prompt_of(tokenizer, request["prompt_tokens"])
    end = began + request["left_s"]
    took_s = 0.0
    for state in ("cold", "warm"):
        now = time.monotonic()
        if end - now < took_s / 2:
            break
        answer = _answer(model, tokenizer, prompt, request["tokens"], end, request["answer_s"])
        took_s = time.monotonic() - now
        yield {"state": state, **answer}
    model.flash.close()


def _answer(model: Any, tokenizer: Any, prompt: list[int], tokens: int, end: float, most_s: float) -> Told:
    """The figures of an answer. It ends after `tokens` tokens, or `most_s` seconds after the first, or at `end`.

    end: a time of time.monotonic().
    """
    from ..flash.system import peak_memory_bytes
    from ..text.generation import stream_generate
    from .energy import EnergyMeter

    meter = EnergyMeter()
    ids, times = [], [time.perf_counter()]
    with closing(stream_generate(model, tokenizer, prompt, max_tokens=tokens)) as responses:
        for response in responses:
            ids.append(response.token)
            times.append(time.perf_counter())
            end = min(end, time.monotonic() + most_s) if len(ids) == 1 else end
            if time.monotonic() > end:
                break
    source, joules = meter.read()
    counted = response.statistics
    assert counted is not None  # `stream_generate` always gives them.
    each = [after - before for before, after in itertools.pairwise(times[1:])] or [0.0]
    return {
        "ids": ids,
        "energy": source,
        "choices": model.flash.trials.choices(),
        "generated_tokens": len(ids),
        "first_token_s": counted.first_token_s,
        "prompt_bytes": counted.prompt.bytes,
        "tokens_per_second": response.generation_tps if len(ids) > 1 else None,
        "token_median_s": statistics.median(each),
        "token_p90_s": sorted(each)[int(0.9 * (len(each) - 1))],
        "hit_rate": counted.hit_rate,
        **counted.per_token(),
        "joules": joules,
        "peak_bytes": peak_memory_bytes(),
    }


WORK: dict[str, Callable[[Told], Iterator[Told]]] = {"examine": examine, "run": run}

if __name__ == "__main__":
    main()
