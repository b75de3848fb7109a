"""Every error this package raises on purpose.

Each message is one or two sentences: what was found, what was expected, what to do. A command prints the message and
exits with the class's `exit_code`.

    FlashError
    ├── UsageError
    │   ├── BudgetError
    │   ├── GrammarError
    │   └── ImageError
    ├── StoreError
    │   ├── NotAStoreError
    │   ├── NewerFormatError
    │   ├── OlderFormatError
    │   ├── TruncatedStoreError
    │   ├── CorruptStoreError
    │   └── MissingTensorError
    ├── CheckpointError
    │   ├── UnsupportedModelError
    │   └── TokenizerError
    ├── ChatTemplateError
    │   └── ChatTemplateFailure
    ├── ReadError
    └── ConversionError
        └── NoSpaceError
"""

from __future__ import annotations


class FlashError(Exception):
    """Base of all errors of this package. A command that ends with one exits with its `exit_code`."""

    exit_code: int = 1


class UsageError(FlashError):
    """An option or argument that cannot be used as given."""

    exit_code = 2


class BudgetError(UsageError):
    """A memory budget that is too small; `smallest_bytes` is the smallest one that works.

    `full_bytes`, `units_bytes` and `bytes_for` are deprecated: `mlx_flash.plan` has `everything` and `bytes_for`.
    """

    def __init__(self, message: str, smallest_bytes: int, full_bytes: int = 0, units_bytes: int = 0) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes
        self.full_bytes = full_bytes
        self.units_bytes = units_bytes

    def bytes_for(self, share: float) -> int:
        """The budget with which this share of the units is resident, or the smallest budget if that is larger."""
        return max(self.smallest_bytes, self.full_bytes - int((1 - share) * self.units_bytes))

    def __reduce__(self) -> tuple[type[BudgetError], tuple[str, int, int, int]]:
        # Pickling an Exception calls the class with the message alone.
        return type(self), (str(self), self.smallest_bytes, self.full_bytes, self.units_bytes)


class GrammarError(UsageError):
    """A grammar, JSON schema or tool that answers cannot be held to, or an answer that cannot be continued."""


class ImageError(UsageError):
    """An image that cannot be used: another format, damaged, too large, or nothing that can be read here."""


class StoreError(FlashError):
    """A store that cannot be used."""


class NotAStoreError(StoreError):
    """A path that is not a store."""


class NewerFormatError(StoreError):
    """A store written in a later version of the format than this package reads."""


class OlderFormatError(StoreError):
    """A store written in an earlier version of the format than this package still reads."""


class TruncatedStoreError(StoreError):
    """A file of a store that is shorter than its index says."""


class CorruptStoreError(StoreError):
    """Bytes of a store that do not match its checksums or its index."""


class MissingTensorError(StoreError):
    """A tensor that the model needs and the store lacks."""


class CheckpointError(FlashError):
    """A checkpoint that cannot be read as its files claim."""


class UnsupportedModelError(CheckpointError):
    """A model family, or a variant of one, that this package does not support."""


class TokenizerError(CheckpointError):
    """A text that the model's tokenizer cannot encode, or a tokenizer that cannot encode any text."""


class ChatTemplateError(FlashError):
    """A chat template that cannot be applied."""


class ChatTemplateFailure(ChatTemplateError):
    """A chat template that raises an error: it refuses the messages, or has a bug."""


class ReadError(FlashError):
    """A failure while streaming: an I/O error, a short read, a changed file, or bytes that do not match a checksum."""


class ConversionError(FlashError):
    """A conversion that could not be finished. The files written so far are kept, so that it can resume."""


class NoSpaceError(ConversionError):
    """A disk with too little room for a conversion or a download."""
