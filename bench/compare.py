"""What the comparisons share: a store, a text, the state of the disk, a memory limit, and figures per token."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from mlx_flash.cli.run import whole_number
from mlx_flash.errors import FlashError, UsageError
from mlx_flash.flash.files import Manifest, read_manifest
from mlx_flash.source.cached import MATRICES, in_use

from .baselines import contenders
from .synthetic.neuron_store import is_synthetic
from .synthetic.opt_checkpoint import SHAPES
from .tools.cgroup import memory_group
from .tools.report import add_output_argument, cached_share, environment, spread, writable_folder

SHARE = 0.6
KIND = "a model that is streamed neuron by neuron"


def add_arguments(parser: argparse.ArgumentParser, tokens: int) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt", type=whole_number(1), default=32, help="tokens of the prompt, taken at once (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens",
        type=whole_number(2),
        default=tokens,
        help="tokens taken one by one, which are timed (default: %(default)s)",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="store, checkpoint or repository id (default: the packaged demo model)")
    parser.add_argument("--text", type=Path, help="plain text to feed (default: the packaged calibration text)")
    parser.add_argument("--no-cgroup", action="store_true", help="do not enforce the budget by a memory cgroup")
    parser.add_argument("--force", action="store_true", help="go on where the machine would swap")
    parser.add_argument(
        "--matrices",
        type=writable_folder,
        metavar="FOLDER",
        help="keep the matrices as the baselines read them here, and reuse them "
        "(default: a temporary folder beside the store)",
    )
    add_output_argument(parser)


def add_share_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--share",
        type=share_of_one,
        help="of the weights' bytes, for flash loading, beside what the process itself needs "
        f"(default: {SHARE}, or the least that the model goes with)",
    )


def share_of_one(text: str) -> float:
    """An argparse type: above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


@dataclass(frozen=True)
class Subject:
    """What is measured. ids: as many tokens as are needed. least: what `sides.run` tells of the side "plan"."""

    store: Path
    manifest: Manifest
    ids: list[int]
    prompt: int
    least: dict[str, Any]
    matrices: Path | None
    fence: str | None  # why no memory cgroup limits the sides; None if one does

    @property
    def label(self) -> str:
        """What the outputs call the model."""
        if not is_synthetic(self.manifest):
            return self.store.resolve().name
        shape = tuple(self.manifest.source["synthetic"]["shape"])
        names = [f"OPT-{name.upper()}" for name, dims in SHAPES.items() if dims == shape]
        return f"synthetic weights of {names[0] if names else ' x '.join(map(str, shape))} shape"

    @property
    def resident_bytes(self) -> int:
        """What always stays in memory, as it is held there."""
        return int(self.least["plan"]["resident_weights"])

    @property
    def weights_bytes(self) -> int:
        return self.resident_bytes + self.manifest.layout.file_bytes

    @property
    def base_bytes(self) -> int:
        """The process itself, interpreter and libraries, as measured; KV cache and work space come out of the share."""
        return int(self.least["plan"]["process"])

    @property
    def streamed(self) -> list[Path]:
        """The large files, the largest first."""
        return ([self.matrices] if self.matrices else []) + [self.store / Manifest.neurons_file]

    @property
    def files(self) -> list[Path]:
        """All that the sides read."""
        names = [Manifest.resident_file, *map(Manifest.predictor_file, self.manifest.predictors)]
        return self.streamed + [self.store / name for name in names]

    def budget_for(self, share: float | None) -> tuple[float, int]:
        """The share, and the budget for the whole process. Raises UsageError where flash loading needs more."""
        budget, least = int((share or SHARE) * self.weights_bytes) + self.base_bytes, self.least["smallest_bytes"]
        if budget >= least:
            return share or SHARE, budget
        needed = (least - self.base_bytes) / self.weights_bytes
        if share is None:
            return needed, least
        remedy = f"pass --share {needed + 0.01:.2f} or more, or leave it out" if needed < 0.99 else "leave it out"
        raise UsageError(
            f"--share {share} gives {budget / 1e6:.0f} MB, the model needs {least / 1e6:.0f} MB: {remedy}."
        )

    def describe(self) -> dict[str, Any]:
        """What every result begins with."""
        return {
            "environment": environment(self.store),
            "model": self.label,
            "synthetic": is_synthetic(self.manifest),
            "store": self.store.name,
            "weights_bytes": self.weights_bytes,
            "base_bytes": self.base_bytes,
            "prompt": self.prompt,
            "predictor": self.least["predictor"],
            "memory_limit": self.fence or "enforced by a memory cgroup",
        }

    def run(
        self, side: contenders.Side, tokens: int, limit: int | None, begin: int = 0, label: str = ""
    ) -> dict[str, Any]:
        """Runs a side over the prompt and `tokens` tokens from ids[begin] on, in a cgroup of `limit` bytes."""
        ids = self.ids[begin : begin + self.prompt + tokens]
        task = contenders.Task(str(self.store), ids, self.prompt, str(self.matrices or ""), label)
        if limit is None or self.fence:
            return contenders.run(side, task)
        with memory_group(limit) as group:
            result = contenders.run(side, task, group)
            return result | {"cgroup_peak_bytes": group.peak_bytes(), "kills": group.kills()}


@contextmanager
def opened(arguments: argparse.Namespace, ids: int, span: int, matrices: bool = True) -> Iterator[Subject]:
    """The store and the text that the arguments name, with the baselines' matrices unless told otherwise.

    ids: tokens needed of the text; span: those of one run. Raises UsageError, before anything long begins, for what
    cannot be used.
    """
    from mlx_flash.source.resolve import find_store

    store = find_store(arguments.model, print)
    manifest = read_manifest(store)
    config = json.loads((store / "config.json").read_text())
    if manifest.layout.quantised or manifest.resident_bits < 16:
        raise UsageError(f"{store} is quantised, which the baselines do not read. Convert with --bits 16.")
    positions = config.get("max_position_embeddings", span)
    refuse_beyond(span, positions, "Lower --tokens or --prompt, or raise --rounds.")
    text = read_ids(arguments.text, store, ids, config["vocab_size"])
    least = contenders.run(contenders.Side("plan"), contenders.Task(str(store), text[:span], arguments.prompt))
    subject = Subject(store, manifest, text, arguments.prompt, least, None, fence_problem(arguments.no_cgroup))
    with with_matrices(subject, arguments.matrices) if matrices else nullcontext(subject) as ready:
        yield ready


def refuse(arguments: argparse.Namespace, options: Sequence[str], kind: str) -> None:
    """Raises UsageError if options were given that have no meaning for this kind of model; not given is None."""
    given = [f"--{option.replace('_', '-')}" for option in options if getattr(arguments, option) is not None]
    if given:
        raise UsageError(f"{' and '.join(given)} cannot be used here: this is {kind}. Leave that out (see --help).")


def refuse_beyond(span: int, positions: int, remedy: str = "Lower --tokens or --prompt.") -> None:
    """Raises UsageError where a run has more tokens than the model positions."""
    if span > positions:
        raise UsageError(f"a run has {span} tokens and the model {positions} positions. {remedy}")


def read_ids(path: Path | None, store: Path, count: int, vocabulary: int) -> list[int]:
    """`count` tokens of a text, which is repeated if it is too short."""
    from mlx_flash.text.tokenizer import load_tokenizer

    from .tools.texts import read_text

    text = read_text(path) if path else files("mlx_flash.convert").joinpath("calibration.txt").read_text("utf-8")
    ids = [*load_tokenizer(store).encode(text, add_special_tokens=False, verbose=False)]
    repeated = np.resize(ids, count) % vocabulary  # a synthetic store's tokenizer is not its own
    return [int(i) for i in repeated]


def fence_problem(unwanted: bool) -> str | None:
    if unwanted:
        return "not enforced (--no-cgroup)"
    try:
        with memory_group(1 << 30):
            return None
    except UsageError as error:
        return f"not enforced: {error}"


def dense_problem(manifest: Manifest) -> str | None:
    """Why `baselines` cannot run a model, or None: they know OPT's tensors and an FFN without a gate."""
    return (
        None if manifest.model_type == "opt" else f"are written for OPT, and this model's type is {manifest.model_type}"
    )


@contextmanager
def with_matrices(subject: Subject, folder: Path | None) -> Iterator[Subject]:
    """With the up and down matrices as a checkpoint has them; in a folder that stays if one is given.

    The file's name has the checksum of the store's own checksums in it: another store's are not taken for them.
    """
    from .baselines.matrices import write_matrices

    if problem := dense_problem(subject.manifest):
        raise UsageError(f"the baselines {problem}. Choose the store of another model.")
    store, layout = subject.store, subject.manifest.layout
    digest = subject.manifest.files[Manifest.neurons_checksums_file]["sha256"]
    temporary = None
    stack = ExitStack()
    try:
        if folder is None:
            try:
                temporary = folder = Path(tempfile.mkdtemp(prefix=MATRICES, dir=store.resolve().parent))
            except OSError as error:
                raise UsageError(f"nothing can be written beside the store ({error}): pass --matrices.") from None
            stack.enter_context(in_use(temporary))
        path = folder / f"matrices-{digest[:12]}.bin"
        if not path.is_file():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_matrices(store, layout, path)
            except OSError as error:
                raise FlashError(
                    f"the baselines' matrices cannot be written into {folder} ({error.strerror}): "
                    "free some room there, or pass another folder as --matrices."
                ) from None
        yield replace(subject, matrices=path)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        stack.close()


def cached_shares(subject: Subject) -> dict[str, float | None]:
    """Of the files that are streamed, what the operating system holds in its page cache now."""
    return {path.name: cached_share(path) for path in subject.streamed}


def figures(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Per token: bytes, reads, and in seconds what it was made of; means, and spreads of the total and of reading.

    samples: Counters of every token as dictionaries; a replay of reads has no `total_s`.
    """

    def mean(key: str) -> float:
        return float(np.mean([sample.get(key, 0.0) for sample in samples]))

    busy = sum(sample["read_s"] for sample in samples)
    needed = sum(sample.get("hits", 0) + sample.get("misses", 0) for sample in samples)
    row: dict[str, Any] = {
        "tokens": len(samples),
        "bytes": mean("bytes"),
        "reads": mean("reads"),
        "bytes_per_second": sum(sample["bytes"] for sample in samples) / busy if busy else None,
        "read_s": mean("read_s"),
        "wait_s": mean("wait_s"),
        "hidden_s": max(0.0, mean("read_s") - mean("wait_s")),
        "manage_s": mean("manage_s"),
        "read_spread_s": spread(sample["read_s"] for sample in samples),
        "hit_rate": sum(sample["hits"] for sample in samples) / needed if needed else None,
        "early": mean("prefetched_used"),
        "vain": mean("prefetched_unused"),
    }
    if "total_s" in samples[0]:
        row["total_s"] = mean("total_s")
        row["compute_s"] = max(0.0, row["total_s"] - row["wait_s"] - row["manage_s"])
        row["total_spread_s"] = spread(sample["total_s"] for sample in samples)
        row["total_each_s"] = [round(sample["total_s"], 5) for sample in samples]
    return row


def steady(rounds: list[list[dict[str, Any]]]) -> float:
    """Median seconds of a token in the second half of every round: the cache is warm by then."""
    return spread(sample["total_s"] for samples in rounds for sample in samples[len(samples) // 2 :])["median"]


def hybrid_title(share: float) -> str:
    """Hybrid keeps half, or less where the budget is less."""
    return "hybrid: half resident" if share >= contenders.HALF else f"hybrid: {share:.0%} resident"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns as wide as they need: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = (f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join([f"{row[0]:<{widths[0]}}", *cells]))


def ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.1f}"


def times(ratio: float | None) -> str:
    return (
        "-" if ratio is None else f"{ratio:.2f}x" if ratio < 1 else f"{ratio:.1f}x" if ratio < 20 else f"{ratio:.0f}x"
    )


def mb(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.0f}" if count >= 1e7 else f"{count / 1e6:.2f}"


def title(figure: Any, finding: str, subject: str) -> None:
    """What was found, in bold over the whole figure; what was measured, below."""
    figure.suptitle(f"{finding}\n", x=0.012, ha="left", fontsize=11, fontweight="bold")
    figure.text(0.012, 1 - 0.36 / figure.get_figheight(), subject, fontsize=9, va="top", color="#555555")
