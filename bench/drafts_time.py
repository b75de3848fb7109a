"""Do drafts pay? Time and bytes per token with and without them, and what a pass over several tokens reads and changes.

The first table is of answers with each number of drafts per pass, greedy, to pieces of a text as prompts. The second
one feeds the tokens of the answers without drafts again, several per pass, as if every draft were right: the units that
such a pass needs, and how many tokens would have been chosen differently than by single tokens after the same text.
"""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

from mlx_flash.cli.run import whole_number
from mlx_flash.defaults import PREFILL_TOKENS
from mlx_flash.errors import UsageError
from mlx_flash.flash.host_arrays import to_numpy

from .quality import say
from .tools import figures
from .tools.report import environment
from .tools.texts import read_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="store, checkpoint or repository id (default: the packaged demo model)")
    parser.add_argument("--draft-model", metavar="DIR_OR_ID", help="draft with this model (default: with n-grams)")
    parser.add_argument("--text", type=Path, required=True, help="file of plain text, whose pieces are the prompts")
    parser.add_argument("--memory", metavar="SIZE", help="memory budget (default: a share of free memory)")
    parser.add_argument("--context", type=int, metavar="N", help="tokens to make room for (default: by the budget)")
    parser.add_argument(
        "--prompts", type=whole_number(1), default=4, help="how many prompts are answered (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt-tokens", type=whole_number(1), default=128, metavar="N", help="tokens of each (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=whole_number(2), default=128, help="tokens of each answer (default: %(default)s)"
    )
    parser.add_argument(
        "--depths", default="1,3,7", help="numbers of drafts per pass to compare with none (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=whole_number(1, 100), default=1, help="(default: %(default)s)")


def main(arguments: argparse.Namespace) -> None:
    text = read_text(arguments.text)
    try:
        depths = [int(depth) for depth in arguments.depths.split(",")]
    except ValueError:
        raise UsageError(f"--depths is {arguments.depths!r}, expected numbers separated by commas.") from None
    from mlx_flash.loading.load import load

    drafts = {"draft": "ngram"} if arguments.draft_model is None else {"draft_model": arguments.draft_model}
    model, tokenizer = load(
        arguments.model, memory=arguments.memory, context=arguments.context, say=say, trials=False, **drafts
    )
    with closing(model.flash):
        most = model.flash.most_positions - 1
        if not all(1 <= depth <= most for depth in depths):
            raise UsageError(f"--depths is {arguments.depths}, expected 1 to {most} for this model.")
        prompts = _prompts(tokenizer, text, arguments, model.flash.plan.context)
        rows, answers = measure(model, tokenizer, prompts, arguments.tokens, [0, *depths], arguments.rounds)
        passes = [replay(model, prompts, answers, positions) for positions in (1, *(depth + 1 for depth in depths))]
        plan, kind = model.flash.plan.as_dict(), model.flash.drafting.kind
    show(rows, passes)
    result = {"command": "drafts", "environment": environment(Path(arguments.model or ".")), "model": arguments.model}
    result |= {"text": arguments.text.name, "prompts": arguments.prompts, "prompt_tokens": arguments.prompt_tokens}
    result |= {"tokens": arguments.tokens, "rounds": arguments.rounds, "kind": kind, "plan": plan}
    print(json.dumps({**result, "depths": rows, "passes": passes}))


def _prompts(tokenizer: Any, text: str, arguments: argparse.Namespace, context: int) -> list[list[int]]:
    """Pieces of the text, evenly spread over it."""
    length, count = arguments.prompt_tokens, arguments.prompts
    ids = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    if len(ids) < length * count:
        raise UsageError(f"--text has {len(ids)} tokens, expected {count} x {length} (--prompts, --prompt-tokens).")
    if length + arguments.tokens > context:
        raise UsageError(
            f"a prompt and its answer have {length + arguments.tokens} tokens, but the plan has {context}."
        )
    step = len(ids) // count
    return [ids[at * step : at * step + length] for at in range(count)]


def measure(
    model: Any, tokenizer: Any, prompts: list[list[int]], tokens: int, depths: list[int], rounds: int
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """A row for each depth, and the answers without drafts (depth 0, the first one).

    The depths take turns. A row has medians over rounds of the seconds per token.
    """
    from mlx_flash.text.generation import stream_generate

    tokenizer.eos_token_ids = [-1]  # All answers have one length.
    found: dict[int, list[list[Any]]] = {depth: [] for depth in depths}
    texts: dict[int, list[list[int]]] = {}
    for _ in range(rounds):
        for depth in depths:
            said, statistics = [], []
            for prompt in prompts:
                *before, last = stream_generate(model, tokenizer, prompt, tokens, num_draft_tokens=depth)
                said.append([response.token for response in (*before, last)])
                statistics.append(last.statistics)
            found[depth].append(statistics)
            texts[depth] = said
    rows = []
    for depth in depths:
        seconds = [sum(each.decode.total_s for each in of) / (tokens * len(prompts)) for of in found[depth]]
        of_texts = found[depth][-1]
        counts = sum((each.drafts for each in of_texts[1:]), of_texts[0].drafts)
        made = tokens * len(prompts)
        rows.append(
            {
                "depth": depth,
                "seconds_per_token": median(seconds),
                "seconds_per_token_of_rounds": seconds,
                "bytes_per_token": sum(each.decode.bytes for each in of_texts) / made,
                "wait_s_per_token": sum(each.decode.wait_s for each in of_texts) / made,
                "tokens_per_pass": made / counts.passes,
                "drafted": counts.drafted,
                "accepted": counts.accepted,
                "same_text": sum(a == b for a, b in zip(texts[depth], texts[0], strict=True)),
            }
        )
    return rows, texts[0]


def replay(model: Any, prompts: list[list[int]], answers: list[list[int]], positions: int) -> dict[str, Any]:
    """Feeds the answers in passes of `positions` tokens. Returns the units and bytes per pass, and what differs."""
    from mlx_lm.models.cache import make_prompt_cache

    counters = model.flash.streamer.counters
    different = tokens = passes = needed = read = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        cache = make_prompt_cache(model)
        for at in range(0, len(prompt) - 1, PREFILL_TOKENS):
            model(mx.array(prompt[at : min(at + PREFILL_TOKENS, len(prompt) - 1)])[None], cache=cache)
            mx.eval([layer.state for layer in cache])
            model.flash.evaluate_guarded()
        fed = [prompt[-1], *answer[:-1]]
        for at in range(0, len(fed) - positions + 1, positions):
            before = counters.copy()
            logits = model(mx.array(fed[at : at + positions])[None], cache=cache)[0]
            chosen = to_numpy(mx.argmax(logits, axis=-1))
            used = counters - before
            wanted = answer[at : at + positions]
            different += sum(one != other for one, other in zip(chosen.tolist(), wanted, strict=True))
            tokens += positions
            passes += 1
            needed += used.hits + used.misses
            read += used.bytes
    return {
        "positions": positions,
        "tokens": tokens,
        "different": different,
        "units_per_pass": needed / passes,
        "bytes_per_pass": read / passes,
    }


def show(rows: list[dict[str, Any]], passes: list[dict[str, Any]]) -> None:
    cells = [
        [
            str(row["depth"]),
            f"{1e3 * row['seconds_per_token']:.2f}",
            f"{1e3 * row['wait_s_per_token']:.2f}",
            f"{row['bytes_per_token'] / 1e6:.3f}",
            f"{row['tokens_per_pass']:.2f}",
            f"{row['accepted'] / row['drafted']:.0%}" if row["drafted"] else "-",
            str(row["same_text"]),
        ]
        for row in rows
    ]
    figures.table(
        ["drafts", "ms per token", "ms waiting", "MB per token", "tokens per pass", "accepted", "same answers"], cells
    )
    one = passes[0]
    cells = [
        [
            str(row["positions"]),
            f"{row['units_per_pass']:.1f}",
            f"{row['units_per_pass'] / one['units_per_pass']:.2f}" if one["units_per_pass"] else "-",
            f"{row['bytes_per_pass'] / 1e6:.3f}",
            f"{row['different']} of {row['tokens']}",
        ]
        for row in passes
    ]
    print()
    figures.table(["tokens in a pass", "units", "x of one", "MB per pass", "chosen differently"], cells)
