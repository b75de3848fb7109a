"""Plans and loads what drafts tokens: an index of n-grams, a small model wholly in memory, or the checkpoint's head."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..errors import CheckpointError, UsageError
from ..flash.files import is_store
from ..source.checkpoint_tensors import tensors_in
from ..source.model_kind import error_line
from ..source.resolve import resolve_source
from ..text.draft_depth import MOST_DEPTH, DraftDepth
from ..text.drafts import HEAD, MODEL, NGRAM, Drafting, DraftModel
from ..text.ngrams import BYTES_PER_TOKEN
from ..text.tokenizer import load_tokenizer
from .config import holds_mixture, number_of, read_config
from .lazy_model import lazy_tensors, open_lazily, read_all
from .memory_needs import Needs, needs_of
from .model_types import CONFIG_ERRORS, model_arguments, model_classes, runs_as_it_is
from .options import LoadOptions
from .own_head import PlannedHead, plan_head
from .streaming_needs import loading_excess_bytes

REMEDY = "Choose a smaller model of the same family (--draft-model), or use --draft ngram."


@dataclass(frozen=True)
class PlannedDraftModel:
    """A draft model whose weights are unread. needs: its needs for a context. positions: most tokens it attends to."""

    folder: Path
    model: Any
    needs: Callable[[int], Needs]
    positions: int | None

    @property
    def note(self) -> str:
        return f"model {self.folder.name}, its KV cache, work space"

    def bytes_at(self, context: int) -> int:
        needs, sizes = self.needs(context), [array.nbytes for array in self._weights()]
        computing = needs.kv_cache + needs.workspace + needs.state_bytes
        return sum(sizes) + max(computing, loading_excess_bytes(sizes))

    def check(self, tokenizer: Any) -> None:
        """Raises UsageError if its vocabulary is not that of `tokenizer`."""
        known, own = _vocabulary(tokenizer), _vocabulary(load_tokenizer(self.folder))
        for number in sorted(known.keys() | own.keys()):
            if known.get(number) != own.get(number):
                there, here = (repr(each[number]) if number in each else "unknown" for each in (own, known))
                raise UsageError(
                    f"{self.folder} cannot draft for this model, because its vocabulary is another one: token {number} "
                    f"is {there} there and {here} here. {REMEDY}"
                )

    def load(self, _: Any, most_positions: int) -> Drafting:
        """Reads the weights. Raises ReadError."""
        read_all(self._weights(), self.folder, "a tensor")
        return Drafting(MODEL, most_positions, DraftModel(self.model, self.positions))

    def _weights(self) -> list[mx.array]:
        named: Any = tree_flatten(self.model.parameters())
        return [array for _, array in named]


@dataclass(frozen=True)
class PlannedDrafts:
    """Drafts before the model that they are for is loaded. model: what makes them; None for n-grams."""

    model: PlannedDraftModel | PlannedHead | None

    @property
    def of_own_head(self) -> bool:
        """Whether the model's own head drafts, so that mlx-vlm must build the model."""
        return isinstance(self.model, PlannedHead)

    @property
    def note(self) -> str:
        """The note for the plan."""
        return "index of n-grams" if self.model is None else self.model.note

    def bytes_at(self, context: int, needs: Needs, most_positions: int) -> int:
        """The memory that drafts take. needs: of the model that they are for. most_positions: most tokens of a pass.

        A pass has logits for each of its tokens, and once more in float32. The states that it may have to go back to
        stay beside its own.
        """
        passing = needs.state_bytes + 2 * 4 * most_positions * needs.vocabulary
        return passing + (BYTES_PER_TOKEN * context if self.model is None else self.model.bytes_at(context))

    def load(self, model: Any) -> Drafting:
        """How `model`, which is loaded, drafts. Raises ReadError."""
        most = model.flash.most_positions
        drafting = Drafting(NGRAM, most) if self.model is None else self.model.load(model, most)
        drafting.depth = DraftDepth(min(MOST_DEPTH, most - 1))
        return drafting


def plan_drafts(options: LoadOptions, source: Path, say: Callable[[str], None], fetch: bool) -> PlannedDrafts | None:
    """The drafts that the options ask for, None if they ask for none.

    source: the folder of the model that they are for. fetch: whether a repository may be downloaded.

    Raises UsageError, CheckpointError, UnsupportedModelError and the errors of `resolve_source`.
    """
    if options.draft == HEAD:
        return PlannedDrafts(plan_head(source))
    if options.draft_model is None:
        return None if options.draft == "none" else PlannedDrafts(None)
    folder = resolve_source(os.fspath(options.draft_model), None, say, fetch=fetch)
    if is_store(folder):
        raise UsageError(f"{folder} is a store, but a draft model is read from its checkpoint. Name the checkpoint.")
    config, mixture = read_config(folder), holds_mixture(folder)
    of_zoo = mixture or runs_as_it_is(config, folder)  # raises its errors before a model is built
    model = _zoo_model(folder) if of_zoo else _own_model(folder, config)
    if mx.default_device() == mx.cpu:  # which is slow at products in any other type
        model.set_dtype(mx.float32)
    model.eval()

    @cache
    def needs(context: int) -> Needs:
        try:
            return needs_of(model, [], context)
        except Exception as error:  # mlx-lm's model and MLX raise plain exceptions
            raise CheckpointError(
                f"the draft model in {folder} cannot be called: {error_line(error)}. Download it again."
            ) from None

    return PlannedDrafts(PlannedDraftModel(folder, model, needs, number_of(config, "max_position_embeddings")))


def _zoo_model(folder: Path) -> Any:
    lazy = open_lazily(folder)
    lazy.provenance.arrays.clear()  # These would stay in memory beside the arrays that are made of them.
    lazy.provenance.tensors.clear()
    return lazy.model


def _own_model(folder: Path, config: dict[str, Any]) -> Any:
    """A model of a type that is ours, as a whole."""
    model_class, args_class = model_classes(config)
    try:
        model = model_class(model_arguments(args_class, config))
        model.load_weights(list(model.sanitize(lazy_tensors(tensors_in(folder))).items()))
    except CONFIG_ERRORS as error:
        raise CheckpointError(
            f"the draft model in {folder} cannot be loaded: {error_line(error)}. Download it again."
        ) from None
    return model


def _vocabulary(tokenizer: Any) -> dict[int, str]:
    """Token ids and the tokens' own spelling."""
    return {number: text for text, number in tokenizer.get_vocab().items()}
