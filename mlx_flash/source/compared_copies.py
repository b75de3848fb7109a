"""Reads the small files of a model once and compares them. Libraries get copies, so they use the compared bytes.

Several libraries read a configuration or a tokenizer, each with its own calls, and a faulty disk may return different
bytes to each of them.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, FlashError
from ..flash.plain_files import reading, reason_of
from .checkpoint_files import MAX_SMALL_BYTES
from .ssd_writes import COPIES, count_written

Compare = Callable[[Path, os.stat_result, bytes], None]


@contextlib.contextmanager
def compared_copies(folder: Path, names: Sequence[str], compare: Compare) -> Iterator[Path]:
    """A temporary folder with copies of some files of `folder`. Errors raised inside name `folder` instead of it.

    names: the files, relative to `folder`. compare: called with a file, its status when it was opened, and its bytes;
    it raises an error for bytes that differ.

    Raises ReadError for a file that cannot be read, CheckpointError for one that is larger than any real one,
    FlashError if there is no room for the copies.
    """
    with temporary_folder() as copy:
        copied = 0  # bytes
        for name in names:
            with reading(folder / name), (folder / name).open("rb") as file:
                status, content = os.fstat(file.fileno()), file.read(MAX_SMALL_BYTES + 1)
            if len(content) > MAX_SMALL_BYTES:
                raise CheckpointError(
                    f"{folder / name} has more than {MAX_SMALL_BYTES >> 20} MiB, which is too large for a file of its "
                    "kind. Remove it, or download it again."
                )
            compare(folder / name, status, content)
            try:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                copied += (copy / name).write_bytes(content)
            except OSError as error:
                raise no_room(error) from None
        count_written(COPIES, copied)
        try:
            yield copy
        except FlashError as error:
            error.args = tuple(_renamed(part, copy, folder) for part in error.args)
            raise


def name_themselves(tokenizer: Any, copy: Path, folder: Path) -> None:
    """Replaces the paths of the copies in a library's tokenizer by those of `folder`, for messages and later reads.

    Sentencepiece tokenizers read their vocabulary again when they are copied or pickled.
    """
    own = getattr(tokenizer, "_tokenizer", tokenizer)
    for place in (vars(own), getattr(own, "init_kwargs", {})):
        for name, value in place.items():
            place[name] = _renamed(value, copy, folder)


def _renamed(value: Any, copy: Path, folder: Path) -> Any:
    """A text with the path of `copy` replaced by that of `folder`, even if its white space was collapsed."""
    if isinstance(value, str):
        for path in (str(copy), " ".join(str(copy).split())):
            value = value.replace(path, str(folder))
    return value


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A temporary folder that is removed at the end. Raises FlashError if it cannot be made."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="mlx-flash-")
    except OSError as error:
        raise no_room(error) from None
    with folder as name:
        yield Path(name)


def no_room(error: Exception) -> FlashError:
    """The error to raise if a temporary folder cannot be written to."""
    return FlashError(
        f"the model's small files cannot be copied into the system's temporary folder: {reason_of(error)}. "
        "Make room there, or set TMPDIR to another folder."
    )
