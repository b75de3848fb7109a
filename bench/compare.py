"""Shared parts of the comparisons: their arguments, opening the model and the text, and which contenders fit."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlx_flash.cli.run import whole_number
from mlx_flash.errors import UsageError
from mlx_flash.flash.files import read_manifest
from mlx_flash.flash.system import available_memory_bytes
from mlx_flash.loading.config import holds_mixture
from mlx_flash.source.resolve import find_store, resolve_source

from .baselines import contenders
from .bench_model import EXPERT_SHARE, NEURON_SHARE, BenchModel, ExpertModel, NeuronModel
from .tools.cgroup import memory_group
from .tools.report import add_output_argument, refuse_to_swap, writable_folder
from .tools.texts import read_text

Kind = Literal["neurons", "experts"]
KINDS: dict[Kind, str] = {"neurons": "a model that is streamed neuron by neuron", "experts": "a mixture of experts"}
SUFFIXES: dict[Kind, str] = {"neurons": "", "experts": "-mixture"}  # appended to the names of the output files


def add_arguments(parser: argparse.ArgumentParser, tokens: int) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt", type=whole_number(1), default=32, help="tokens of the prompt, in one pass (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens",
        type=whole_number(2),
        default=tokens,
        help="tokens to decode one by one and time (default: %(default)s)",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="store, checkpoint or repository id (default: the packaged demo model)")
    parser.add_argument("--text", type=Path, help="file of plain text to run (default: the packaged calibration text)")
    parser.add_argument("--no-cgroup", action="store_true", help="do not enforce the budget with a memory cgroup")
    parser.add_argument("--force", action="store_true", help="continue even if the machine would swap")
    parser.add_argument(
        "--matrices",
        type=writable_folder,
        metavar="FOLDER",
        help="keep the baselines' matrices here and reuse them (default: a temporary folder beside the store)",
    )
    add_output_argument(parser)


def add_share_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--share",
        type=share_of_one,
        help="budget of flash loading as a share of the weights' bytes, on top of the process's own size "
        f"(default: {NEURON_SHARE}, or the smallest that the model can run with)",
    )


def add_expert_arguments(parser: argparse.ArgumentParser) -> Any:
    """Adds and returns the group of options that only apply to mixtures of experts."""
    group = parser.add_argument_group("mixtures of experts", "read from the original checkpoint, without a conversion")
    group.add_argument(
        "--memory",
        metavar="SIZE",
        help=f"budget of the whole process, such as 4GB (default: slots for {EXPERT_SHARE:.0%}% of the experts)",
    )
    return group


def share_of_one(text: str) -> float:
    """An argparse type for a share: above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


# -- the model and the text ----------------------------------------------------------------------------------


def mixture_folder(model: str | None) -> Path | None:
    """The checkpoint that --model names if it is a mixture of experts, else None."""
    if model is None:
        return None
    folder = resolve_source(model, None, print)
    return folder if holds_mixture(folder) else None


def find_model(arguments: argparse.Namespace, refused: Mapping[Kind, Sequence[str]]) -> tuple[Kind, Path | None]:
    """The kind of the model that --model names, and the folder of a mixture. `opened` makes a store later.

    refused: options that do not apply to a kind; they are None unless given. Raises UsageError if one is given.
    """
    folder = mixture_folder(arguments.model)
    kind: Kind = "neurons" if folder is None else "experts"
    given = [f"--{name.replace('_', '-')}" for name in refused.get(kind, ()) if getattr(arguments, name) is not None]
    if given:
        raise UsageError(
            f"{' and '.join(given)} cannot be used here: this is {KINDS[kind]}. Leave it out (see --help)."
        )
    return kind, folder


@contextmanager
def opened(
    arguments: argparse.Namespace, mixture: Path | None = None, rounds: int = 1, matrices: bool = True
) -> Iterator[BenchModel]:
    """Yields the model and the text that the arguments name.

    mixture: the folder that `find_model` returned. rounds: number of runs that share --tokens. matrices: whether to
    make the files that the baselines read. Raises UsageError for unusable arguments before anything slow begins.
    """
    folder = mixture or find_store(arguments.model, print)
    if not mixture and ((manifest := read_manifest(folder)).layout.quantised or manifest.resident_bits < 16):
        raise UsageError(f"{folder} is quantised, which the baselines do not read. Convert with --bits 16.")
    span = arguments.prompt + -(-arguments.tokens // rounds)
    about = contenders.ask_about(folder, span)
    if span > about["positions"]:
        remedy = "Lower --tokens or --prompt." if mixture else "Lower --tokens or --prompt, or raise --rounds."
        raise UsageError(f"a run has {span} tokens, but the model has {about['positions']} positions. {remedy}")
    ids = read_ids(arguments.text, folder, rounds * span, about["vocabulary"])
    kind = ExpertModel if mixture else NeuronModel
    model = kind(folder, about, ids, arguments.prompt, fence_problem(arguments.no_cgroup))
    if matrices:
        with model.ready_for_baselines(arguments.matrices) as ready:
            yield ready
    else:
        yield model


def read_ids(path: Path | None, folder: Path, count: int, vocabulary: int) -> list[int]:
    """The first `count` tokens of a text; a short text is repeated."""
    from mlx_flash.text.tokenizer import load_tokenizer

    text = read_text(path) if path else files("mlx_flash.convert").joinpath("calibration.txt").read_text("utf-8")
    ids = [*load_tokenizer(folder).encode(text, add_special_tokens=False, verbose=False)]
    repeated = np.resize(ids, count) % vocabulary  # a synthetic store has the tokenizer of another model
    return [int(i) for i in repeated]


def fence_problem(unwanted: bool) -> str | None:
    """The reason why no memory cgroup can limit a process here, or None."""
    if unwanted:
        return "not enforced (--no-cgroup)"
    try:
        with memory_group(1 << 30):
            return None
    except UsageError as error:
        return f"not enforced: {error}"


# -- the contenders ------------------------------------------------------------------------------------------


def those_left_out(model: BenchModel, names: Sequence[str], wanted: bool, force: bool) -> dict[str, str]:
    """The contenders that do not fit in memory: name -> reason. Only a memory cgroup keeps the lazy one from swapping.

    wanted: whether the user named them. If so, raises UsageError instead of leaving one out.
    """
    unbounded = [name for name in names if name == model.whole or (name == "lazy" and model.fence)]
    needed = model.weights_bytes + model.base_bytes
    if wanted:
        for name in unbounded:
            refuse_to_swap(needed, name, force)
    if wanted or force or needed <= available_memory_bytes():
        return {}
    reason = f"needs {needed / 1e9:.1f} GB, and nothing else keeps the machine from swapping"
    return dict.fromkeys(unbounded, reason)


def hybrid_title(share: float) -> str:
    """The title of the hybrid contender, which keeps half of the weights, or less if the budget is smaller."""
    return "hybrid: half resident" if share >= contenders.HALF else f"hybrid: {share:.0%} resident"
