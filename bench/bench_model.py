"""The model that a comparison measures, of either kind: its budgets, and how a contender runs on it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from mlx_flash.defaults import IO_MODES
from mlx_flash.errors import UsageError
from mlx_flash.flash.files import Manifest, read_manifest
from mlx_flash.loading.plan import parse_memory

from .baselines import contenders
from .baselines.contenders import Contender
from .baselines.matrices import kept_matrices, matrices_problem
from .tools import disk
from .tools.cgroup import memory_group
from .tools.report import cached_share, environment, forget_cached, refuse_to_swap
from .tools.subprocess_json import KilledError

NEURON_SHARE = 0.6  # default of --share, of the weights' bytes
EXPERT_SHARE = 0.25  # share of the experts that have a slot at the default of --memory


@dataclass(frozen=True)
class BenchModel:
    """The parts that both kinds of model share.

    about: the answer of `contenders.examine`. ids: the tokens of all runs. fence: the reason why no memory cgroup
    limits the contenders; None if one does. matrices: the baselines' file, once it is written.
    """

    folder: Path
    about: dict[str, Any]
    ids: list[int]
    prompt: int
    fence: str | None
    matrices: Path | None = field(default=None, kw_only=True)

    kind: ClassVar[str]
    whole: ClassVar[str]  # name of the contender that holds the whole model in memory

    @property
    def weights_bytes(self) -> int:
        return int(self.about["resident_bytes"] + self.about["streamed_bytes"])

    @property
    def base_bytes(self) -> int:
        """The measured size of the process itself: the interpreter and the libraries."""
        return int(self.about["process_bytes"])

    @property
    def streamed(self) -> list[Path]:
        """The files that hold the units, the largest first."""
        return ([self.matrices] if self.matrices else []) + [Path(file) for file in self.about["streamed"]]

    def budget_for(self, slots: int) -> int:
        """The budget in bytes at which so many units have a slot, over all layers."""
        least = self.about["layers"] * self.about["least_units"]
        return int(self.about["smallest_bytes"] + (slots - least) * self.about["unit_bytes"])

    def budget(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """The result's fields about the budget, with "budget_bytes". Raises UsageError if the budget is too small."""
        raise NotImplementedError

    def limit_of(self, name: str, budget: int) -> int | None:
        """The memory limit of a contender in bytes; None for no limit."""
        return None if name == self.whole else budget

    def whole_problem(self) -> str | None:
        """The reason why the contender `whole` cannot run this model at all, or None."""
        return None

    @contextmanager
    def ready_for_baselines(self, folder: Path | None) -> Iterator[BenchModel]:
        """Yields the model with all files that the baselines read. folder: keeps them; None: a temporary folder."""
        yield self

    def prepare_disk(self) -> dict[str, Any]:
        """Brings the disk into a known state. Returns the result's fields about it."""
        return {"disk_first": disk.prepare([*self.streamed, *map(Path, self.about["other_files"])])}

    def describe(self) -> dict[str, Any]:
        """The first fields of every result."""
        return {
            "environment": environment(self.folder),
            "streams": self.kind,
            "weights_bytes": self.weights_bytes,
            "base_bytes": self.base_bytes,
            "prompt": self.prompt,
            "memory_limit": self.fence or "enforced by a memory cgroup",
            **self.about["told"],
        }

    def cached_shares(self) -> dict[str, float | None]:
        """The share of each streamed file that is in the page cache now."""
        return {path.name: cached_share(path) for path in self.streamed}

    def run(
        self, contender: Contender, tokens: int, limit: int | None, label: str = "", begin: int = 0
    ) -> dict[str, Any]:
        """Runs a contender over the prompt and `tokens` tokens from ids[begin] on, in a cgroup of `limit` bytes.

        The streamed files are dropped from the page cache first, as far as the system allows it. Returns the fields of
        `contenders.run` and the conditions of the run. If the kernel kills a mixture's contender for memory, "killed"
        is True and the fields of `contenders.run` are missing.
        """
        rate = disk.sequential_rate(self.streamed[:1], disk.RATE_BYTES)
        for file in self.streamed:
            forget_cached(file)
        run: dict[str, Any] = {
            "side": contender.name,
            "limit_bytes": limit,
            "memory_bytes": contender.memory,
            "io": contender.options.get("io", IO_MODES[0]),
            "disk": rate,
            "sequential_bytes_per_second": rate["bytes"] / rate["seconds"],
            "cached_share_before": self.cached_shares(),
            "killed": False,
        }
        ids = self.ids[begin : begin + self.prompt + tokens]
        matrices, label = str(self.matrices or ""), label or contender.name
        task = contenders.Task(str(self.folder), ids, self.prompt, matrices, label, time.time())
        if limit is None or self.fence:
            run |= contenders.run(contender, task)
        else:
            with memory_group(limit) as group:
                try:
                    run |= contenders.run(contender, task, group)
                    run["cgroup_peak_bytes"] = group.peak_bytes()
                except KilledError:
                    if self.kind == "neurons":  # its ratios need every contender's figures
                        raise
                    run["killed"] = True
        return run | {"cached_share_after": self.cached_shares()}


class NeuronModel(BenchModel):
    """A store with streamed neurons."""

    kind = "neurons"
    whole = "dense"

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.folder)

    def budget(self, arguments: argparse.Namespace) -> dict[str, Any]:
        share, least = arguments.share, self.about["smallest_bytes"]
        budget = int((share or NEURON_SHARE) * self.weights_bytes) + self.base_bytes
        if budget < least:
            needed = (least - self.base_bytes) / self.weights_bytes
            if share is not None:
                remedy = f"pass --share {needed + 0.01:.2f} or more, or leave it out"
                raise UsageError(
                    f"--share {share} gives {budget / 1e6:.0f} MB, the model needs {least / 1e6:.0f} MB: "
                    f"{remedy if needed < 0.99 else 'leave it out'}."
                )
            share, budget = needed, least
        share = share or NEURON_SHARE
        refuse_to_swap(budget, f"{share:.0%} of the model", arguments.force)
        return {"share": share, "budget_bytes": budget}

    def whole_problem(self) -> str | None:
        return matrices_problem(self.manifest)

    @contextmanager
    def ready_for_baselines(self, folder: Path | None) -> Iterator[BenchModel]:
        with kept_matrices(self.folder, self.manifest, folder) as path:
            yield replace(self, matrices=path)


class ExpertModel(BenchModel):
    """A mixture of experts, read from its original checkpoint."""

    kind = "experts"
    whole = "resident"

    def budget(self, arguments: argparse.Namespace) -> dict[str, Any]:
        about, least = self.about, self.about["smallest_bytes"]
        slots = about["layers"] * max(1, round(EXPERT_SHARE * about["units"]))
        budget = parse_memory(arguments.memory) if arguments.memory else self.budget_for(slots)
        if budget < least:
            raise UsageError(
                f"--memory is {budget / 1e6:.0f} MB, but the model needs {least / 1e6:.0f} MB. Pass at least that, or "
                "leave the flag out."
            )
        refuse_to_swap(budget, "the budget", arguments.force)
        return {"budget_bytes": budget}

    def limit_of(self, name: str, budget: int) -> int | None:
        if name != "naive":
            return super().limit_of(name, budget)
        two_layers = 2 * self.about["units"] * self.about["unit_bytes"]  # "naive" holds two layers at a time
        return max(budget, self.budget_for(0) + two_layers)
