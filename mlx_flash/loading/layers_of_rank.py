"""Another rank's part of a dense model: its range of layers, with their KV caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..layers.pipeline_text import DIGEST_BYTES
from ..layers.ranked_layers import FOLLOW, LAYERS, OtherRank, connect
from ..ranks.group import Call, FollowingGroup
from ..text.cached_context import make_room
from .in_place_loading import plan_in_place
from .in_place_model import open_in_place
from .layer_ranges import find_joints, keep_range
from .layer_ranks import capacity_of, needs_at
from .options import LoadOptions
from .quantised_cache import plain_cache
from .rank_questions import tell_user, this_host


class LayersOfRank:
    """The model is built lazily, as on rank 0, and no other weight than those of the range is read.

    asked: the value of the question "plan". Raises the errors of `plan_in_place`.
    """

    kind = LAYERS

    def __init__(self, group: FollowingGroup, folder: Path, options: LoadOptions, asked: dict[str, Any]) -> None:
        self._group, self._folder = group, folder
        self._mixture = open_in_place(folder)
        find_joints(self._mixture)
        self._options = replace(options, context=int(asked["context"]), prompt_cache=0)
        sharing = group.size if asked["host"] == this_host() else 1
        needs = needs_at(self._mixture, self._options)
        self._capacity = capacity_of(self._mixture, self._options, needs, sharing, ends=False)
        self._options = replace(self._options, memory=self._capacity.budget)
        self._model: Any = None
        self._rank: OtherRank | None = None

    @property
    def questions(self) -> dict[str, Callable[[Any], dict[str, Any]]]:
        """What rank 0 may ask once the layers are loaded."""
        return {} if self._rank is None else {FOLLOW: self._rank.can_follow}

    def offer(self) -> dict[str, Any]:
        return self._capacity.as_answer()

    def build(self, share: dict[str, Any]) -> None:
        """Raises BudgetError, ReadError."""
        mixture, modules = self._mixture, [layer.module for layer in self._mixture.layers]
        keep_range(mixture, range(*share["ranges"][self._group.rank]), ends=False)
        _, build, _, _ = plan_in_place(self._folder, mixture, self._options)
        self._model = model = build(tell_user)
        unchanged = model.flash.verify_unchanged
        self._rank = OtherRank(model, lambda: plain_cache(model), unchanged, make_room)
        connect(modules, self._rank)

    def __call__(self, call: Call) -> mx.array:
        """Computes the range. Raises ReadError, and FlashError for a text that it cannot continue."""
        assert self._rank is not None
        digest: np.ndarray = call.ids[: DIGEST_BYTES // call.ids.itemsize]
        (x,) = call.arrays
        return self._rank.compute(x, call.ids[len(digest) :], call.numbers["tokens"], digest.tobytes())

    @property
    def bytes_read(self) -> int:
        return 0 if self._model is None else int(self._model.flash.streamer.counters.bytes)

    def close(self) -> None:
        if self._model is not None:
            self._model.flash.close()
