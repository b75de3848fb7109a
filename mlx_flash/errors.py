"""Every error this package raises on purpose.

Each message is one or two sentences: what was found, what was expected, what to do. A command line prints the message
and exits with the class's `exit_code`; nothing else needs to be known about an error.
"""

from __future__ import annotations


class FlashError(Exception):
    """Base of all errors of this package; `exit_code` is what a command line ends with."""

    exit_code: int = 1


class UsageError(FlashError):
    """An option or argument that cannot be used as given."""

    exit_code = 2


class BudgetError(UsageError):
    """The memory budget is too small; `smallest_bytes` is the smallest one that would do."""

    def __init__(self, message: str, smallest_bytes: int) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes

    def __reduce__(self) -> tuple[type[BudgetError], tuple[str, int]]:
        # Exception's own pickling would call the class with the message alone.
        return type(self), (str(self), self.smallest_bytes)


class StoreError(FlashError):
    """A store that cannot be used."""


class NotAStoreError(StoreError):
    """A path that holds no store."""


class NewerFormatError(StoreError):
    """A store written by a later version of the format than this package reads."""


class OlderFormatError(StoreError):
    """A store written by an earlier version of the format than this package still reads."""


class TruncatedStoreError(StoreError):
    """A file of a store that ends before its index says."""


class CorruptStoreError(StoreError):
    """Bytes of a store that disagree with its checksum or its index."""


class MissingTensorError(StoreError):
    """A tensor that the model needs and the store lacks."""


class CheckpointError(FlashError):
    """A checkpoint that cannot be read as what it claims to be."""


class UnsupportedModelError(CheckpointError):
    """A model family, or a variant of one, that this package does not run."""


class TokenizerError(CheckpointError):
    """A text that the model's tokenizer cannot encode, or a tokenizer that cannot encode any."""


class ChatTemplateError(FlashError):
    """A chat template that cannot be applied."""


class ChatTemplateFailure(ChatTemplateError):
    """A chat template that raises an error: it refuses these messages, or has a fault."""


class ReadError(FlashError):
    """An I/O error, a short read, a changed file or bytes that do not match their checksum, while streaming."""


class ConversionError(FlashError):
    """A conversion that could not be finished; what was written so far is kept for resuming."""


class NoSpaceError(ConversionError):
    """The disk has less room than the conversion needs."""
