"""python -m mlx_flash.generate: text from a model that streams from the SSD."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from .commands import run_command
from .errors import UsageError
from .model_arguments import add_model_arguments, load_model

DEFAULT_PROMPT = "Once upon a time"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_flash.generate",
        description="Generates text. Attention stays in memory; feed-forward weights are read from the SSD when a "
        "token needs them. Text goes to standard output, everything else to standard error.",
    )
    add_model_arguments(parser)
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", "-p", default=DEFAULT_PROMPT, help="the prompt; - reads it from standard input")
    text.add_argument("--max-tokens", "-m", type=int, default=100, metavar="N", help="tokens to make (default: 100)")
    text.add_argument("--temp", type=float, default=0.0, help="sampling temperature, 0 is greedy (default: 0)")
    text.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default: 1, off)")
    text.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest (default: 0, off)")
    text.add_argument("--min-p", type=float, default=0.0, help="drop what is this much less likely (default: 0, off)")
    text.add_argument("--seed", type=int, help="seed of the sampler")
    text.add_argument("--system-prompt", help="system message for the chat template")
    text.add_argument("--ignore-chat-template", action="store_true", help="use the prompt as it is")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


class Interrupts:
    """The first Ctrl-C asks for a clean end, the second one insists."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupts:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def check(arguments: argparse.Namespace) -> None:
    """Raises UsageError for numbers that mean nothing; before anything is loaded."""
    if arguments.max_tokens < 1:
        raise UsageError(f"--max-tokens is {arguments.max_tokens}, expected at least 1.")
    if arguments.temp != 0 and not 1e-3 <= arguments.temp <= 1e3:  # beyond, logits over- or underflow
        raise UsageError(f"--temp is {arguments.temp}, expected 0, or 0.001 to 1000.")
    if not 1e-6 <= arguments.top_p <= 1:
        raise UsageError(f"--top-p is {arguments.top_p}, expected 0.000001 to 1.")
    if not 0 <= arguments.min_p <= 1:
        raise UsageError(f"--min-p is {arguments.min_p}, expected 0 to 1.")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**64:
        raise UsageError(f"--seed is {arguments.seed}, expected 0 to 2**64 - 1.")
    if arguments.top_k < 0:
        raise UsageError(f"--top-k is {arguments.top_k}, expected 0 or more.")


def read_prompt(arguments: argparse.Namespace) -> str:
    prompt = arguments.prompt
    try:
        if prompt == "-":
            prompt = sys.stdin.read() if sys.stdin else ""
        prompt.encode()  # bytes that are no text come as lone surrogates
    except UnicodeError:
        raise UsageError("the prompt is not valid UTF-8 text.") from None
    if not prompt:
        raise UsageError("the prompt is empty; give one with --prompt, or on standard input with --prompt -.")
    return prompt


def apply_template(tokenizer: Any, prompt: str, arguments: argparse.Namespace) -> str | list[int]:
    """The prompt as the model's chat template wants it, where it has one."""
    if tokenizer.chat_template is None or arguments.ignore_chat_template:
        if arguments.system_prompt is not None:
            say("note: --system-prompt is not used without a chat template")
        return prompt
    messages = [{"role": "user", "content": prompt}]
    if arguments.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": arguments.system_prompt})
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # notes that cannot be shown must not cost the text
        print(text, file=sys.stderr, flush=True)


def main(arguments: argparse.Namespace) -> int:
    check(arguments)
    prompt_text = read_prompt(arguments)
    model, tokenizer = load_model(arguments, say)
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    from .generation import stream_generate

    vocabulary = model.flash.vocabulary
    if arguments.top_k >= vocabulary:
        raise UsageError(f"--top-k is {arguments.top_k}, expected less than the vocabulary of {vocabulary}.")
    sampler = make_sampler(arguments.temp, arguments.top_p, arguments.min_p, top_k=arguments.top_k)
    mx.eval(sampler(mx.zeros((1, vocabulary))))  # compiled here, not in the first token's time
    if arguments.seed is not None:
        mx.random.seed(arguments.seed)
    prompt = apply_template(tokenizer, prompt_text, arguments)
    tokens: list[int] = []
    pieces: list[str] = []
    response = None
    with Interrupts() as interrupts:
        try:
            for response in stream_generate(
                model,
                tokenizer,
                prompt,
                arguments.max_tokens,
                sampler=sampler,
                prompt_progress_callback=progress_line(interrupts),
            ):
                print(response.text, end="", flush=True)
                pieces.append(response.text)
                tokens.append(response.token)
                if interrupts.asked:
                    break
        except PromptInterrupted:
            pass
    print(flush=True)
    if response is None:
        say("interrupted while the prompt was read: no token was made")
        result = {"text": "", "tokens": [], "generation_tokens": 0, "plan": model.flash.plan.as_dict()}
    else:
        if interrupts.asked:
            say("interrupted")
        elif response.finish_reason == "length" and len(tokens) < arguments.max_tokens:
            say(f"note: the context of {model.flash.plan.context} tokens is full{more_context(model)}")
        report(response, model)
        result = as_json(response, model, "".join(pieces), tokens)
    if arguments.json:
        print(json.dumps(result), flush=True)
    model.flash.close()
    return 130 if interrupts.asked else 0


def more_context(model: Any) -> str:
    """What to do about it, if anything can be done."""
    return " (--context)" if model.flash.plan.context < model.flash.positions else ": the model has no more"


class PromptInterrupted(Exception):
    """Ctrl-C while the prompt was being read."""


def progress_line(interrupts: Interrupts) -> Callable[[int, int], None]:
    """Shows how far a long prompt is, on a terminal, after two seconds; also where Ctrl-C is noticed."""
    began = time.monotonic()
    shown = False

    def show(done: int, total: int) -> None:
        nonlocal shown
        if interrupts.asked:
            raise PromptInterrupted
        if done == total and shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        elif sys.stderr.isatty() and time.monotonic() - began > 2:
            shown = True
            print(f"\rprompt: {done} of {total} tokens", end="", file=sys.stderr, flush=True)

    return show


def report(response: Any, model: Any) -> None:
    """mlx-lm's three lines and ours."""
    statistics = response.statistics
    each = statistics.per_token()
    say(f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec")
    say(f"Generation: {response.generation_tokens} tokens, {response.generation_tps:.3f} tokens-per-sec")
    say(f"Peak memory: {response.peak_memory:.3f} GB of {model.flash.plan.budget / 1e9:.3f} GB")
    say(f"First token: {statistics.first_token_s:.3f} s")
    hits = "none needed" if statistics.hit_rate is None else f"{statistics.hit_rate:.1%} hits"
    rate = statistics.bytes_per_second
    speed = "no reads" if rate is None else f"{rate / 1e9:.3f} GB/s while reading"
    say(
        f"Streaming ({model.flash.predictor}): {hits}, {each['bytes_per_token'] / 1e6:.3f} MB and "
        f"{each['reads_per_token']:.1f} reads per token, {speed}"
    )
    say(
        f"Time per token: {1e3 * each['wait_s']:.2f} ms waiting for reads, {1e3 * each['manage_s']:.2f} ms cache "
        f"management, {1e3 * each['compute_s']:.2f} ms compute"
    )


def as_json(response: Any, model: Any, text: str, tokens: list[int]) -> dict[str, Any]:
    statistics = response.statistics
    return {
        "text": text,
        "tokens": tokens,
        "prompt_tokens": response.prompt_tokens,
        "generation_tokens": response.generation_tokens,
        "prompt_tps": response.prompt_tps,
        "generation_tps": response.generation_tps,
        "first_token_s": statistics.first_token_s,
        "peak_memory_bytes": int(response.peak_memory * 1e9),
        "hit_rate": statistics.hit_rate,
        **statistics.per_token(),
        "predictor": model.flash.predictor,
        "predictor_measured": model.flash.setting and model.flash.setting.measured,
        "plan": model.flash.plan.as_dict(),
    }


if __name__ == "__main__":
    run_command(make_parser(), main)
