"""Measures the quality lost by streaming: perplexity, top-1 agreement, KL and zero-shot tasks beside the dense model.

Every position of the text, and of a task's questions and answers, takes the decode path with a selection of its own.
The dense model is the same model with all neurons. It is read layer by layer, so it need not fit into memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mlx_flash.cli.run import whole_number
from mlx_flash.defaults import CONTEXT, KV_BITS, PREDICTORS
from mlx_flash.errors import UsageError
from mlx_flash.flash.system import peak_memory_bytes

from .tools import tasks
from .tools.report import environment, spread
from .tools.score import compare
from .tools.texts import read_text

LEAST_TOKENS = 16


def add_window_arguments(parser: argparse.ArgumentParser, tokens: int) -> None:
    """Adds the arguments for scoring a text in windows. tokens: how many are scored by default."""
    parser.add_argument(
        "--tokens",
        type=whole_number(LEAST_TOKENS, 10**9),
        default=tokens,
        metavar="N",
        help="score only the first N tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--context",
        type=whole_number(LEAST_TOKENS),
        default=CONTEXT,
        metavar="N",
        help="tokens of a window; each window starts empty (default: %(default)s, at most the model's positions)",
    )
    parser.add_argument("--memory", metavar="SIZE", help="budget, such as 6GB (default: a share of the free memory)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="store, checkpoint or repository id (default: the packaged demo model)")
    parser.add_argument("--text", type=Path, help="file of plain text that the model was not trained on")
    add_window_arguments(parser, tokens=4096)
    parser.add_argument(
        "--predictor",
        choices=PREDICTORS,
        default="auto",
        help="predictor that chooses the neurons (default: the store's own)",
    )
    parser.add_argument(
        "--kv-bits",
        type=int,
        choices=KV_BITS,
        help="quantise the streamed model's KV cache, not the dense model's (default: the model's own precision)",
    )
    parser.add_argument(
        "--tasks",
        metavar="NAMES",
        help="comma-separated list of lm-eval tasks, such as arc_easy,hellaswag, or of YAML files or folders of them",
    )
    parser.add_argument(
        "--limit",
        type=whole_number(1, 10**9),
        metavar="N",
        help="ask only the first N questions of each task (default: all)",
    )


def main(arguments: argparse.Namespace) -> None:
    if arguments.text is None and arguments.tasks is None:
        raise UsageError(
            "nothing to measure: pass --text FILE (text that the model was not trained on), --tasks, or both."
        )
    text = None if arguments.text is None else read_text(arguments.text)
    # The tasks come first: if they fail, no model is loaded, and the plan must count the memory that they take.
    found = [] if arguments.tasks is None else tasks.find(arguments.tasks)
    from mlx_flash.loading.load import load
    from mlx_flash.source.resolve import find_store

    store = find_store(arguments.model, say)
    model, tokenizer = load(
        store,
        memory=arguments.memory,
        predictor=arguments.predictor,
        context=arguments.context,
        kv_bits=arguments.kv_bits,
        say=say,
    )
    try:
        plan = model.flash.plan
        result: dict[str, Any] = {
            "command": "quality",
            "environment": environment(store),
            "model": "demo" if arguments.model is None else arguments.model,
            "predictor": model.flash.predictor,
            "context": plan.context,
            "kv_bits": arguments.kv_bits,
            "perplexity": None,
            "dense_perplexity": None,
        }
        if text is not None:
            result |= {"text": arguments.text.name, **score_text(model, tokenizer, text, arguments)}
            show_text(result)
        if found:
            result["tasks"] = tasks.evaluate(model, tokenizer, found, arguments.limit)
            tasks.show(result["tasks"], model.flash.predictor)
        result |= {"plan": plan.as_dict(), "peak_memory_bytes": peak_memory_bytes()}
    finally:
        model.flash.close()
    print(json.dumps(result))


def score_text(model: Any, tokenizer: Any, text: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Scores the text with the streamed and the dense model.

    KL is the divergence of the streamed model's next-token distribution from the dense model's, in nats per token.
    """
    from mlx_lm.models.cache import make_prompt_cache

    from mlx_flash.loading.quantised_cache import plain_cache

    ids = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))[: arguments.tokens]
    if len(ids) < LEAST_TOKENS:
        raise UsageError(f"--text {arguments.text} has {len(ids)} tokens, expected at least {LEAST_TOKENS}.")
    prefix = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    with tqdm(total=len(ids), desc="perplexity", unit="token", dynamic_ncols=True) as bar:
        found = compare(model, lambda: make_prompt_cache(model), ids, prefix, bar.update, lambda: plain_cache(model))
    tokens, divergences = found.dense.tokens, found.divergences
    return {
        "tokens": tokens,
        "perplexity": found.streamed.perplexity,
        "dense_perplexity": found.dense.perplexity,
        "rise": found.rise,
        "rise_error": found.rise_error,
        "top1_agreement": found.agreed / tokens,
        "kl_nats": {"mean": sum(divergences) / tokens, **spread(divergences), "max": max(divergences)},
    }


def show_text(result: dict[str, Any]) -> None:
    heads = ("perplexity", "against dense", "std. error", "same top-1", "KL mean", "median", "p99")
    print(f"{'':<15}" + "".join(f"{head:>14}" for head in heads))
    print(f"{'dense (ceiling)':<15}{readable(result['dense_perplexity']):>14}")
    kl = result["kl_nats"]
    cells = [
        readable(result["perplexity"]),
        f"{result['rise']:+.3%}",
        f"{result['rise_error']:.3%}",
        f"{result['top1_agreement']:.2%}",
        *(f"{kl[key]:.2e}" for key in ("mean", "median", "p99")),
    ]
    print(f"{result['predictor']:<15}" + "".join(f"{cell:>14}" for cell in cells))
    print(f"{result['tokens']} tokens of {result['text']} in windows of {result['context']}; KL in nats per token")


def readable(perplexity: float) -> str:
    return f"{perplexity:.3f}" if perplexity < 1e6 else f"{perplexity:.3e}"  # random weights give huge values


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
