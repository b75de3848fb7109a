"""python -m mlx_flash.generate: text from a model that streams from the SSD."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .cli.model_arguments import add_model_arguments, load_model
from .cli.printable import for_stream
from .cli.rank_arguments import add_rank_arguments, ranks_of
from .cli.run import program, run_command
from .cli.terminal import WITHOUT_TEMPLATE, Interrupts, PromptInterrupted, context_hint, progress_line, say
from .errors import ChatTemplateError, UsageError
from .text.sampling import add_sampling_arguments, check_sampling, make_processors, sampling_of, seeded_sampler

if TYPE_CHECKING:
    from .ranks.group import Group

DEFAULT_PROMPT = "Once upon a time"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("generate"),
        description="Generates text. Weights that do not fit into the memory budget are read from the SSD when a token "
        "needs them. Text goes to standard output, everything else to standard error.",
    )
    add_model_arguments(parser, prompt_cache="0")  # There is one prompt.
    add_rank_arguments(parser)
    text = parser.add_argument_group("text")
    text.add_argument(
        "--prompt",
        "-p",
        default=DEFAULT_PROMPT,
        help="the prompt; - reads it from standard input (default: %(default)r)",
    )
    text.add_argument(
        "--image",
        metavar="PATH",
        action="append",
        default=[],
        help="an image that the prompt is about; may be given several times; implies --images",
    )
    add_sampling_arguments(text, max_tokens=100)
    text.add_argument("--system-prompt", help="system message for the chat template")
    text.add_argument("--ignore-chat-template", action="store_true", help="use the prompt as it is")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def read_prompt(arguments: argparse.Namespace) -> str:
    prompt = arguments.prompt
    try:
        if prompt == "-":
            prompt = sys.stdin.read() if sys.stdin else ""
        prompt.encode()  # Bytes that are not text arrive as lone surrogates.
    except UnicodeError:
        raise UsageError("the prompt is not valid UTF-8 text.") from None
    if not prompt:
        raise UsageError("the prompt is empty; give one with --prompt, or on standard input with --prompt -.")
    return prompt


def apply_template(tokenizer: Any, prompt: str, arguments: argparse.Namespace, context: int) -> str | list[int]:
    """The prompt in the form of the model's chat template, if it has one. Raises ChatTemplateError.

    context: number of tokens that the plan makes room for.
    """
    from .text.chat_template import has_chat_template, prompt_text, tokens_of, with_images
    from .text.template_process import TemplateProcess

    if not has_chat_template(tokenizer) or arguments.ignore_chat_template:
        if arguments.system_prompt is not None:
            say("note: --system-prompt is not used without a chat template")
        return prompt
    messages: list[dict[str, Any]] = [{"role": "user", "content": with_images(prompt, len(arguments.image))}]
    if arguments.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": arguments.system_prompt})
    try:
        with contextlib.closing(TemplateProcess()) as process:
            text = prompt_text(process, tokenizer, messages, most=context)
            return text if arguments.image else tokens_of(tokenizer, text, most=context)
    except ChatTemplateError as error:
        raise type(error)(f"{error} {WITHOUT_TEMPLATE}") from None


def main(arguments: argparse.Namespace) -> int:
    check_sampling(arguments)
    asked = read_prompt(arguments)
    from .text.images import check_count, read_image

    check_count(len(arguments.image))
    pictures = [read_image(path) for path in arguments.image]
    arguments.images = arguments.images or bool(pictures)
    with ranks_of(arguments, program("generate")) as group:
        return generate(arguments, asked, pictures, group)


def generate(arguments: argparse.Namespace, asked: str, pictures: list[Any], group: Group | None) -> int:
    """Prints a text. asked: the prompt. pictures: what it is about. Returns the exit code."""
    model, tokenizer = load_model(arguments, say, group)
    from .text.generation import stream_generate, summary

    sampling = sampling_of(arguments, model.flash.defaults)
    if model.flash.defaults.sampling:
        say(f"sampling: {sampling.describe()} (options not given are from the model's generation_config.json)")
    sampler = seeded_sampler(sampling, model.flash.vocabulary)
    prompt: Any = apply_template(tokenizer, asked, arguments, model.flash.plan.context)
    cache = None
    if pictures:
        from .text.image_prompts import processor_of, see

        if prompt == asked:  # there is no chat template
            prompt = processor_of(model).mark * len(pictures) + asked
        seen = processor_of(model).prompt(prompt, pictures)
        prompt, cache = seen.ids, see(model, seen)
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
                prompt_cache=cache,
                logits_processors=make_processors(sampling, lambda: ()),
                prompt_progress_callback=progress_line(interrupts),
            ):
                print(for_stream(response.text, sys.stdout), end="", flush=True)
                pieces.append(response.text)
                tokens.append(response.token)
                if interrupts.asked:
                    break
        except PromptInterrupted:
            pass
        except Exception:
            if pieces:
                print(flush=True)  # The sentence that follows begins a line.
            raise
    print(flush=True)
    if response is None:
        say("interrupted while reading the prompt; no token was generated")
        result = {"text": "", "tokens": [], "generation_tokens": 0, "plan": model.flash.plan.as_dict()}
    else:
        if interrupts.asked:
            say("interrupted")
        elif response.finish_reason == "length" and len(tokens) < arguments.max_tokens:
            say(f"note: the context of {model.flash.plan.context} tokens is full. {context_hint(model)}")
        for line in summary(response, model):
            say(line)
        result = as_json(response, model, "".join(pieces), tokens)
    if arguments.json:
        print(json.dumps(result), flush=True)
    model.flash.close()
    return 130 if interrupts.asked else 0


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
        "ranks": statistics.of_ranks(),
        "drafts": None if statistics.drafts is None else asdict(statistics.drafts),
        "swap": None if statistics.swap is None else asdict(statistics.swap),
        "choices": model.flash.trials.choices(),
        "predictor": model.flash.predictor,
        "predictor_measured": model.flash.setting and model.flash.setting.measured,
        "plan": model.flash.plan.as_dict(),
    }


if __name__ == "__main__":
    run_command(make_parser(), main)
