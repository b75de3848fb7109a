"""The arguments that choose a model and limit its resources, shared by every command that loads one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..defaults import (
    CONTEXT,
    DRAFTS,
    IO_MODES,
    KV_BITS,
    MAX_CONTEXT,
    MOST_CONTEXT,
    PREDICTORS,
    PREFILL_TOKENS,
    THREADS,
    WIRE_MODES,
)
from .run import REVISION_HELP

if TYPE_CHECKING:
    from ..loading.options import LoadOptions
    from ..ranks.group import Group


def add_model_arguments(parser: argparse.ArgumentParser, prompt_cache: str = "auto") -> None:
    """prompt_cache: the default of --prompt-cache."""
    model = parser.add_argument_group("model and memory")
    model.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="folder of a store or a checkpoint, or a Hugging Face id; checkpoints run as they are, except for those "
        "of ReLU models, which are first converted into the cache folder (default: the packaged demo model)",
    )
    model.add_argument("--revision", help=REVISION_HELP)
    model.add_argument(
        "--memory", metavar="SIZE", help="budget for the whole process, such as 6GB (default: a share of free memory)"
    )
    model.add_argument(
        "--context",
        type=_context,
        metavar="N",
        help=f"tokens to reserve memory for, at most the model's positions; {MAX_CONTEXT} for all of them (default: "
        f"{CONTEXT} to {MOST_CONTEXT}, as long as two thirds of the slots remain; where layers are read, at most a "
        "tenth more of them)",
    )
    model.add_argument(
        "--kv-bits",
        type=int,
        choices=KV_BITS,
        help="quantise the KV cache to so many bits per number, which may change the text (default: the model's own "
        "precision)",
    )
    model.add_argument(
        "--prefill-chunk",
        type=int,
        default=PREFILL_TOKENS,
        metavar="N",
        help="tokens of a prompt that are read in one pass; more take more memory and, where experts or neurons are "
        "read, fewer bytes per prompt (several passes share the reads of layers anyway); another number may change the "
        "text (default: %(default)s)",
    )
    model.add_argument(
        "--prompt-cache",
        default=prompt_cache,
        metavar="SIZE",
        help="part of --memory, such as 2GB, that keeps the contexts of earlier conversations, so that they are not "
        "read again; 0 for none; auto for a tenth of what --memory has beyond the smallest budget, at most three "
        "contexts of --context tokens. The plan says how many tokens it holds (default: %(default)s)",
    )
    model.add_argument(
        "--predictor",
        default="auto",
        choices=PREDICTORS,
        help="how active neurons are found: auto (the store's default), none (use all), exact (the resident first "
        "projection), or a stored predictor; a mixture of experts uses its router instead (default: %(default)s)",
    )
    model.add_argument(
        "--recall",
        type=float,
        metavar="R",
        help="share of the active neurons that a stored predictor should find; higher finds more and reads more "
        "(default: the store's own target)",
    )
    model.add_argument(
        "--window",
        type=int,
        metavar="K",
        help="evict by a sliding window of K tokens (default: evict the least used)",
    )
    model.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help=f"reader threads (default: {THREADS}, and tried while tokens are generated)",
    )
    model.add_argument(
        "--io",
        choices=IO_MODES,
        help=f"read past the page cache (direct) or through it (buffered) (default: {IO_MODES[0]}, and tried while "
        "tokens are generated)",
    )
    model.add_argument(
        "--draft",
        choices=DRAFTS,
        default=DRAFTS[0],
        help="guess several tokens and verify them in one pass over the weights: ngram guesses what followed the same "
        "words before, mtp asks the checkpoint's own draft head, if mlx-vlm runs it (needs the extra vlm); how many "
        "follows from what earlier answers measured; rounding may change the text (default: %(default)s)",
    )
    model.add_argument(
        "--draft-model",
        metavar="DIR_OR_ID",
        help="draft by a small model of the same vocabulary instead, which is wholly in memory (default: none)",
    )
    model.add_argument(
        "--adapter",
        metavar="DIR_OR_ID",
        help="folder, or a Hugging Face id, of a LoRA or DoRA adapter that mlx-lm trained for the model; what it adds "
        "stays in memory (default: none)",
    )
    model.add_argument(
        "--verify",
        action="store_true",
        help="compare what is read of a checkpoint with checksums, units at every read; the first run "
        "reads the whole checkpoint to make them, and compares it with the Hub's checksums where those are known "
        "(reads of a store are always compared)",
    )
    model.add_argument(
        "--wire",
        choices=WIRE_MODES,
        default=WIRE_MODES[0],
        help="keep weights and slots in memory, on macOS 15 and later: auto does so if the system swapped while an "
        "earlier run of this model generated (default: %(default)s)",
    )
    model.add_argument(
        "--no-warm-start",
        dest="warm_start",
        action="store_false",
        help="do not fill the slots with the units that earlier runs used most, and do not keep in the cache folder "
        "how often this run uses each unit",
    )
    model.add_argument(
        "--images",
        action="store_true",
        help="let the model read images: mlx-vlm builds it, with its vision part in memory (needs the extra vlm)",
    )


def model_flags(arguments: argparse.Namespace) -> list[str]:
    """The flags, with their values, that give another process these arguments; defaults are left out."""
    parser = argparse.ArgumentParser(add_help=False)
    add_model_arguments(parser)
    flags: list[str] = []
    for action in parser._actions:
        value = getattr(arguments, action.dest)
        if value != action.default:
            flags.append(f"{action.option_strings[0]}" if action.nargs == 0 else f"{action.option_strings[0]}={value}")
    return flags


def _context(text: str) -> int | str:
    if text == MAX_CONTEXT:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor {MAX_CONTEXT}") from None


def load_model(
    arguments: argparse.Namespace, say: Callable[[str], None], group: Group | None = None
) -> tuple[Any, Any]:
    """(model, tokenizer) loaded as the arguments say. say, group: see `load`, whose errors are raised."""
    from ..loading.load import load

    return load(arguments.model, options_of(arguments), say=say, group=group)


def options_of(arguments: argparse.Namespace) -> LoadOptions:
    from ..loading.options import LoadOptions

    given = vars(arguments)  # `parallel` is the server's alone
    return LoadOptions(**{field.name: given[field.name] for field in fields(LoadOptions) if field.name in given})
