"""Another rank's part of a mixture: its share of every layer's experts, and nothing else of the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..flash.in_place import InPlaceFiles
from ..layers.expert_shares import ExpertShares
from ..layers.experts import StreamedExperts
from ..layers.ranked_experts import EXPERTS, ExpertCalls, HeldExperts
from ..ranks.group import FollowingGroup
from .expert_ranks import capacity, compare_zoo, held_of, plan_of_share
from .fill_slots import fill_slots
from .in_place_model import InPlaceModel, open_in_place
from .options import LoadOptions
from .rank_questions import on_host_of_rank_0, tell_user
from .rank_shares import slots_of_layers
from .reading_trials import reader_for
from .resident_weights import compare_headers, open_files, ranges_in
from .runtime import Runtime, evaluate_constants
from .units_of_rank import UnitsOfRank
from .verification import attach_sums


class ExpertsOfRank(UnitsOfRank):
    """The model is built lazily, as on rank 0, and its resident weights are never read.

    asked: the value of the question "plan". Raises the errors of `plan_in_place`.
    """

    kind = EXPERTS

    def __init__(self, group: FollowingGroup, folder: Path, options: LoadOptions, asked: dict[str, Any]) -> None:
        super().__init__()
        self._group, self._folder, self._options, self._choices = group, folder, options, int(asked["choices"])
        compare_zoo(asked["mlx-vlm"])
        self._mixture: InPlaceModel | None = open_in_place(folder, zoo=asked["zoo"], images=options.images)
        sharing, taken = on_host_of_rank_0(asked, group.size)
        self._plan = plan_of_share(self._mixture, options, self._choices, sharing, taken)

    def offer(self) -> dict[str, Any]:
        assert self._mixture is not None
        plan = self._plan
        return capacity(self._mixture, sum(plan.slots), plan.budget, self._choices, self._options).as_answer()

    def build(self, share: dict[str, Any]) -> None:
        """Raises ReadError."""
        mixture, self._mixture = self._mixture, None  # It goes once its experts are in slots.
        assert mixture is not None
        rank, options = self._group.rank, self._options
        shares = [ExpertShares(counts) for counts in share["counts"]]
        slots = slots_of_layers(sum(self._plan.slots), [counts[rank] for counts in share["counts"]])
        files = open_files(mixture.files, direct=options.io != "buffered")
        reader = reader_for(options)
        if options.verify:
            attach_sums(files, ranges_in(mixture, files), reader, tell_user)
            compare_headers(mixture, files)
        streamer = InPlaceFiles(files, reader)
        found = held_of(mixture, streamer, shares, rank, slots, options.window)
        layers = [StreamedExperts(module, units) for _, module, units in found]
        for layer in layers:
            evaluate_constants(layer)
        plan = replace(self._plan, slots=tuple(slots))  # There may be fewer experts than it has room for.
        self._flash = Runtime(plan, streamer, layers, "router", vocabulary=0, positions=0)
        both = zip(layers, shares, strict=True)
        self._calls = ExpertCalls(rank, [HeldExperts(layer, of_layer) for layer, of_layer in both])
        fill_slots(self._flash, self._folder, warm=False, shown=False)
