"""The model that a comparison measures: its budgets, and a run of a contender on it, for both kinds."""

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

NEURON_SHARE = 0.6  # of the weights' bytes, without --share
EXPERT_SHARE = 0.25  # of the experts that have a slot, without --memory


@dataclass(frozen=True)
class BenchModel:
    """What both kinds of model have in common.

    about: what `contenders.examine` tells. ids: as many tokens as are needed. fence: why no memory cgroup limits the
    contenders; None if one does. matrices: the baselines' file, once it is written.
    """

    folder: Path
    about: dict[str, Any]
    ids: list[int]
    prompt: int
    fence: str | None
    matrices: Path | None = field(default=None, kw_only=True)

    kind: ClassVar[str]
    whole: ClassVar[str]  # the contender that has all in memory

    @property
    def weights_bytes(self) -> int:
        return int(self.about["resident_bytes"] + self.about["streamed_bytes"])

    @property
    def base_bytes(self) -> int:
        """The process itself, interpreter and libraries, as measured."""
        return int(self.about["process_bytes"])

    @property
    def streamed(self) -> list[Path]:
        """The files that units are read from, the largest first."""
        return ([self.matrices] if self.matrices else []) + [Path(file) for file in self.about["streamed"]]

    def budget_for(self, slots: int) -> int:
        """What gives so many units a slot, over all layers."""
        least = self.about["layers"] * self.about["least_units"]
        return int(self.about["smallest_bytes"] + (slots - least) * self.about["unit_bytes"])

    def budget(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """What a result says of the budget, "budget_bytes" in it. Raises UsageError where the budget does not do."""
        raise NotImplementedError

    def limit_of(self, name: str, budget: int) -> int | None:
        """The memory limit of a contender."""
        return None if name == self.whole else budget

    def whole_problem(self) -> str | None:
        """Why the contender `whole` cannot run this model at all, or None."""
        return None

    @contextmanager
    def ready_for_baselines(self, folder: Path | None) -> Iterator[BenchModel]:
        """The model with all files that the baselines read. folder: where they stay; None: in a temporary one."""
        yield self

    def prepare_disk(self) -> dict[str, Any]:
        """Brings the disk into a known state; what a result says of it."""
        return {"disk_first": disk.prepare([*self.streamed, *map(Path, self.about["other_files"])])}

    def describe(self) -> dict[str, Any]:
        """What every result begins with."""
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
        """Of the files that units are read from, what the operating system holds in its page cache now."""
        return {path.name: cached_share(path) for path in self.streamed}

    def run(
        self, contender: Contender, tokens: int, limit: int | None, label: str = "", begin: int = 0
    ) -> dict[str, Any]:
        """Runs a contender over the prompt and `tokens` tokens from ids[begin] on, in a cgroup of `limit` bytes.

        It begins with nothing of the streamed files in the page cache, as far as the system can be told so. Returns
        what `contenders.run` tells and how it ran. If the kernel kills a mixture's contender for memory, "killed" is
        True and the former is missing.
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
                    if self.kind == "neurons":  # every figure is one of a set there
                        raise
                    run["killed"] = True
        return run | {"cached_share_after": self.cached_shares()}


class NeuronModel(BenchModel):
    """A store, whose neurons are streamed."""

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
    """A mixture of experts, whose checkpoint is read as it is."""

    kind = "experts"
    whole = "resident"

    def budget(self, arguments: argparse.Namespace) -> dict[str, Any]:
        about, least = self.about, self.about["smallest_bytes"]
        slots = about["layers"] * max(1, round(EXPERT_SHARE * about["units"]))
        budget = parse_memory(arguments.memory) if arguments.memory else self.budget_for(slots)
        if budget < least:
            raise UsageError(
                f"--memory is {budget / 1e6:.0f} MB and the model needs {least / 1e6:.0f} MB: give that, or leave it "
                "out."
            )
        refuse_to_swap(budget, "the budget", arguments.force)
        return {"budget_bytes": budget}

    def limit_of(self, name: str, budget: int) -> int | None:
        if name != "naive":
            return super().limit_of(name, budget)
        two_layers = 2 * self.about["units"] * self.about["unit_bytes"]  # which "naive" has in memory at a time
        return max(budget, self.budget_for(0) + two_layers)
