"""How long does the next turn of a conversation wait for its first token after a restart?

Beside the same turn with the conversation in memory, and with all of it read again. Before each turn from the disk, the
file is dropped from the page cache. With `--day`, a day of use is simulated instead, and what it writes is counted.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.cli.run import whole_number
from mlx_flash.errors import UsageError

from .memory_models import COMMON, write_random_mixture
from .quality import say
from .tools import figures
from .tools.report import COLOURS, add_output_argument, environment, finish, forget_cached, require_plots

ANSWER, QUESTION = 8, 12  # tokens
DAY_TURNS, DAY_CONVERSATIONS, DAY_RESTARTS = 200, 12, (67, 134)
DAY_IN_MEMORY = 3  # conversations, beside the last one
SMALL: dict[str, Any] = {
    **COMMON,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
}
# A day asks many questions, and the tokens that it writes do not depend on the model's width.
DAY_SIZES = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64, "num_attention_heads": 4}
KINDS: dict[str, dict[str, Any]] = {  # of caches -> a small random model that has them
    "plain": {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "windows": {
        "model_type": "gpt_oss",
        "num_local_experts": 8,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_scaling": None,
    },
    "linear-attention": {
        "model_type": "qwen3_next",
        "num_experts": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "shared_expert_intermediate_size": 256,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "partial_rotary_factor": 0.5,
    },
    "state-space": {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": "M*E-",
        "mamba_num_heads": 8,
        "mamba_head_dim": 64,
        "mamba_proj_bias": False,
        "ssm_state_size": 64,
        "conv_kernel": 4,
        "n_groups": 2,
        "time_step_limit": [0.0, 100.0],
        "layer_norm_epsilon": 1e-5,
        "mlp_bias": False,
        "use_bias": False,
        "use_conv_bias": True,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "moe_shared_expert_intermediate_size": 256,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", help="folder or repository id")
    model.add_argument("--random", choices=sorted(KINDS), help="a small random model with such caches")
    parser.add_argument("--memory", metavar="SIZE", help="memory budget (default: as for `generate`)")
    parser.add_argument(
        "--tokens", type=whole_number(64, 10**6), default=4000, help="of the conversation (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=whole_number(1, 20), default=3, help="rounds to take the median of (default: %(default)s)"
    )
    parser.add_argument(
        "--day",
        action="store_true",
        help=f"simulate a day: {DAY_TURNS} turns over {DAY_CONVERSATIONS} conversations, of which memory keeps "
        f"{DAY_IN_MEMORY}, and {len(DAY_RESTARTS)} restarts",
    )
    add_output_argument(parser)


def main(arguments: argparse.Namespace) -> None:
    require_plots()
    with _loaded(arguments) as (model, tokenizer), tempfile.TemporaryDirectory(prefix="mlx_flash-") as folder:
        simulate = _day if arguments.day else _measured
        result = {
            "model": arguments.model or f"random, {arguments.random}",
            "environment": environment(Path(folder)),
            **simulate(model, tokenizer, Path(folder), arguments),
        }
    show, draw = (_show_day, _draw_day) if arguments.day else (_show, _draw)
    name = "restart-day" if arguments.day else "restart"
    finish(arguments.output, name, result, lambda figure: draw(figure, result), show=lambda: show(result))


@contextlib.contextmanager
def _loaded(arguments: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
    """(model, tokenizer whose texts have no end)."""
    from mlx_flash.loading.load import load

    with tempfile.TemporaryDirectory(prefix="mlx_flash-") as folder:
        path = arguments.model
        if path is None:
            path = folder
            mx.random.seed(0)
            sizes = {**SMALL, **KINDS[arguments.random], **(DAY_SIZES if arguments.day else {})}
            write_random_mixture(Path(folder), sizes, mx.float32, None)
        context = None if arguments.day else arguments.tokens + 10 * (ANSWER + QUESTION)
        model, tokenizer = load(path, memory=arguments.memory, context=context, say=say, trials=False)
        try:
            tokenizer._eos_token_ids = {-1}
            yield model, tokenizer
        finally:
            model.flash.close()


class _MeasuredTurns:
    """Conversations that may be kept on the disk."""

    def __init__(self, model: Any, tokenizer: Any, folder: Path | None, planned_bytes: int | None = None) -> None:
        from mlx_flash.source.conversation_folder import ConversationFolder
        from mlx_flash.text.conversation_files import ConversationFiles
        from mlx_flash.text.prompt_cache import ReusedPromptCache

        self.files, self.tokenizer = None, tokenizer
        if folder is not None:
            kept = ConversationFolder(folder / "conversations", f"bench-{'0' * 12}", {}, 10**12)
            self.files = ConversationFiles(kept, model, say)
        self.cache = ReusedPromptCache(model, self.files)
        if planned_bytes is not None:
            self.cache.planned_bytes = planned_bytes

    def ask(self, prompt: list[int], answer: int = ANSWER) -> tuple[float, list[int], list[bytes]]:
        """(seconds to the first token, the answer, the bits of its log-probabilities)."""
        from mlx_flash.flash.host_arrays import to_bytes

        began, first, made, bits = time.perf_counter(), 0.0, [], []
        for response in self.cache.stream_generate(self.tokenizer, prompt, answer):
            first = first or time.perf_counter() - began
            made.append(response.token)
            bits.append(to_bytes(response.logprobs).tobytes())
        return first, made, bits


def _measured(model: Any, tokenizer: Any, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(1)

    def words(count: int) -> list[int]:
        return rng.integers(0, model.flash.vocabulary, count).tolist()  # type: ignore[no-any-return]

    first, question = words(arguments.tokens), words(QUESTION)
    turns = _MeasuredTurns(model, tokenizer, folder)
    made = turns.ask(first)[1]
    began = time.perf_counter()
    turns.cache.close()
    write_s = time.perf_counter() - began
    (path,) = folder.glob("conversations/*/*.safetensors")
    after = [*first, *made, *question]
    in_memory = _MeasuredTurns(model, tokenizer, None)
    in_memory.ask(first)
    _, expected, bits = in_memory.ask(after)
    in_memory.cache.forget()
    rounds: list[dict[str, float]] = []
    same_bits = same_text = True
    for _ in range(arguments.rounds):
        again = _MeasuredTurns(model, tokenizer, None)
        read_s, text, _ = again.ask(after)
        same_text = same_text and text == expected
        memory_s = again.ask([*after, *text, *question])[0]
        again.cache.forget()
        forget_cached(path)
        restarted = _MeasuredTurns(model, tokenizer, folder)
        disk_s, _, found = restarted.ask(after)
        if restarted.cache.reused != len(first) + ANSWER - 1:
            raise UsageError(f"only {restarted.cache.reused} tokens came from the disk; is --memory too small?")
        same_bits = same_bits and found == bits
        restarted.cache.forget()
        rounds.append({"memory_s": memory_s, "disk_s": disk_s, "read_s": read_s})
    medians = {name: median(each[name] for each in rounds) for name in rounds[0]}
    return {
        "tokens": arguments.tokens,
        "file_bytes": path.stat().st_size,
        "write_s": write_s,
        "rounds": rounds,
        **medians,
        "ratio": medians["disk_s"] / medians["read_s"],
        "same_bits": same_bits,
        "same_text": same_text,
    }


def _day(model: Any, tokenizer: Any, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(1)

    def words(count: int) -> list[int]:
        return rng.integers(0, model.flash.vocabulary, count).tolist()  # type: ignore[no-any-return]

    talks = [words(int(rng.integers(200, 1500))) for _ in range(DAY_CONVERSATIONS)]
    plan = model.flash.plan
    each = plan.demand.kv_cache / plan.context  # bytes per token
    planned = int(DAY_IN_MEMORY * 1.2 * each * sum(map(len, talks)) / len(talks))
    turns, found, reused, fed = _MeasuredTurns(model, tokenizer, folder, planned), 0, 0, 0
    last = 0
    for turn in range(DAY_TURNS):
        if turn in DAY_RESTARTS:
            turns.cache.close()
            found += turns.files.found  # type: ignore[union-attr]
            turns = _MeasuredTurns(model, tokenizer, folder, planned)
        # Two of three turns continue the conversation; the others go to another one.
        last = last if rng.random() < 0.67 else int(rng.integers(DAY_CONVERSATIONS))
        talk = talks[last]
        talk += words(int(rng.integers(10, 80)))
        _, made, _ = turns.ask(talk, 16)
        reused, fed = reused + turns.cache.reused, fed + len(talk)
        talk += made
    turns.cache.close()
    assert turns.files is not None
    state = turns.files.folder.state()
    return {
        "turns": DAY_TURNS,
        "conversations": DAY_CONVERSATIONS,
        "restarts": len(DAY_RESTARTS),
        "found": found + turns.files.found,
        "prompt_tokens": fed,
        "reused_share": reused / fed,
        "bytes_per_token": each,
        "tokens_at_the_end": sum(map(len, talks)),
        "written_bytes": state.written_today_bytes,
        "written_tokens": state.written_today_bytes / each,
        "used_bytes": state.used_bytes,
        "statistics": asdict(turns.files.statistics()),
    }


def _show(result: dict[str, Any]) -> None:
    rows = [[f"{result['tokens']:,}", f"{result['file_bytes'] / 1e6:,.1f}"]]
    rows[0] += [f"{1e3 * result[name]:,.0f}" for name in ("memory_s", "disk_s", "read_s", "write_s")]
    rows[0] += [f"{result['ratio']:.3f}", *("yes" if result[name] else "no" for name in ("same_bits", "same_text"))]
    heads = ["tokens", "file, MB", "in memory, ms", "from disk, ms", "read again, ms", "written in, ms"]
    figures.table([*heads, "disk / read", "bits as in memory", "text as read again"], rows)
    print("medians of the time to the first token of the next turn")


def _show_day(result: dict[str, Any]) -> None:
    figures.table(
        ["turns", "from disk", "tokens reused", "bytes per token", "written, MB", "written, tokens", "on disk, MB"],
        [
            [
                f"{result['turns']}",
                f"{result['found']}",
                f"{result['reused_share']:.1%}",
                f"{result['bytes_per_token']:,.0f}",
                f"{result['written_bytes'] / 1e6:,.1f}",
                f"{result['written_tokens']:,.0f}",
                f"{result['used_bytes'] / 1e6:,.1f}",
            ]
        ],
    )


def _draw(figure: Any, result: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    bars = (("memory_s", "in memory", "ours"), ("disk_s", "from disk", "good"), ("read_s", "read again", "reading"))
    for place, (name, _, colour) in enumerate(bars):
        axes.barh(place, result[name], color=COLOURS[colour])
        axes.text(result[name], place, f" {1e3 * result[name]:,.0f} ms", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [label for _, label, _ in bars])
    axes.set_xlabel("seconds to the first token")
    figures.title(figure, f"After a restart, {result['ratio']:.1%} of reading again", result["model"])


def _draw_day(figure: Any, result: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    bars = (("tokens_at_the_end", "tokens of all conversations"), ("written_tokens", "tokens written to the disk"))
    for place, (name, _) in enumerate(bars):
        axes.barh(place, result[name], color=COLOURS["ours"])
        axes.text(result[name], place, f" {result[name]:,.0f}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [label for _, label in bars])
    figures.title(figure, f"{result['turns']} turns of {result['conversations']} conversations", result["model"])
