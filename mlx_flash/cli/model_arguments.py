"""The arguments that say which model is loaded and what it may use: the same for every command that loads one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ..defaults import CONTEXT, IO_MODES, PREDICTORS, THREADS
from .run import REVISION_HELP

if TYPE_CHECKING:
    from ..loading.options import LoadOptions


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model and memory")
    model.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="folder of a store or of a checkpoint, or a Hugging Face id; a mixture of experts runs from its "
        "checkpoint as it is, other checkpoints are converted into the cache folder first (default: the packaged demo "
        "model)",
    )
    model.add_argument("--revision", help=REVISION_HELP)
    model.add_argument(
        "--memory", metavar="SIZE", help="budget for the whole process, such as 6GB (default: a share of what is free)"
    )
    model.add_argument(
        "--context",
        type=int,
        default=CONTEXT,
        metavar="N",
        help="tokens the plan makes room for, at most the model's positions (default: %(default)s)",
    )
    model.add_argument(
        "--predictor",
        default="auto",
        choices=PREDICTORS,
        help="how active neurons are found: auto (the store's default), none (use all), exact (the resident first "
        "projection), or a stored predictor; a mixture of experts has its router instead (default: %(default)s)",
    )
    model.add_argument(
        "--recall",
        type=float,
        metavar="R",
        help="share of the active neurons that a stored predictor is to catch; higher finds more and reads more "
        "(default: the store's own target)",
    )
    model.add_argument(
        "--window",
        type=int,
        metavar="K",
        help="evict by a sliding window of K tokens (default: evict the least used)",
    )
    model.add_argument(
        "--threads", type=int, default=THREADS, metavar="N", help="reader threads (default: %(default)s)"
    )
    model.add_argument(
        "--io",
        choices=IO_MODES,
        default=IO_MODES[0],
        help="past the page cache or not (default: %(default)s)",
    )
    model.add_argument(
        "--verify",
        action="store_true",
        help="compare all that is read of a mixture's checkpoint with checksums, its experts at every read; the first "
        "run with it reads the whole checkpoint, compares it with what the Hub has, where that is known, and makes "
        "them (what is read of a store is always compared)",
    )


def load_model(arguments: argparse.Namespace, say: Callable[[str], None]) -> tuple[Any, Any]:
    """(model, tokenizer) as the arguments want them; `say` gets the plan and notes. Raises what `load` raises."""
    from ..loading.load import load

    return load(arguments.model, options_of(arguments), say=say)


def options_of(arguments: argparse.Namespace) -> LoadOptions:
    from ..loading.options import LoadOptions

    return LoadOptions(**{field.name: getattr(arguments, field.name) for field in fields(LoadOptions)})
