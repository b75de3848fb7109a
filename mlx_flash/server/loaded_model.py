"""A model that is loaded, with all that answers need of it, from its loading to its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import ReadError
from .events import EventHub
from .monitor import Monitor

FilesOf = Callable[[Any], Any]  # a model -> where its conversations are kept on the disk, or None


@dataclass
class LoadedModel:
    """format: the tokenizer's AnswerFormat. turns: the ReusedPromptCache. answers: the ParallelAnswers, once used."""

    model: Any
    tokenizer: Any
    format: Any = None
    grammars: Any = None
    turns: Any = None
    monitor: Monitor | None = None
    answers: Any = None

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, hub: EventHub, totals: dict[str, float] | None, files_of: FilesOf
    ) -> LoadedModel:
        """totals: those of the models before it."""
        from ..text.answer_parts import AnswerFormat
        from ..text.grammar import Grammars
        from ..text.prompt_cache import ReusedPromptCache  # The import of mlx-lm is part of loading.

        try:
            return cls(
                model,
                tokenizer,
                AnswerFormat(tokenizer),
                Grammars(tokenizer, model.flash.vocabulary),
                ReusedPromptCache(model, files_of(model)),
                Monitor(model, hub, totals),
            )
        except BaseException:
            model.flash.close()
            raise

    def is_lost_by(self, error: Exception) -> bool:
        """Whether an answer ended with `error` because the model's files went away."""
        return isinstance(error, ReadError) and bool(self.model.flash.is_lost())

    def close(self) -> None:
        """Writes the conversations to the disk, stops the reader's threads and closes the model's files."""
        try:
            if self.turns is not None:
                self.turns.close()
        finally:
            self.model.flash.close()
