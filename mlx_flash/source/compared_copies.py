"""The small files of a model, read once and compared: libraries are given copies, so they use what was compared.

A configuration or a tokenizer is read by several libraries, each with its own calls, and a disk may return other bytes
to each of them.
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

Compare = Callable[[Path, os.stat_result, bytes], None]


@contextlib.contextmanager
def compared_copies(folder: Path, names: Sequence[str], compare: Compare) -> Iterator[Path]:
    """A temporary folder with copies of some files of `folder`; an error that names it is raised with `folder`.

    names: of the files, below `folder`. compare: called with a file, its status when it was opened, and its bytes;
    raises what it finds.

    Raises ReadError for a file that cannot be read, CheckpointError for one that is larger than any real one,
    FlashError if there is no room for the copies.
    """
    with temporary_folder() as copy:
        for name in names:
            with reading(folder / name), (folder / name).open("rb") as file:
                status, content = os.fstat(file.fileno()), file.read(MAX_SMALL_BYTES + 1)
            if len(content) > MAX_SMALL_BYTES:
                raise CheckpointError(
                    f"{folder / name} has more than {MAX_SMALL_BYTES >> 20} MiB, which no file of its kind has. Remove "
                    "it, or download it again."
                )
            compare(folder / name, status, content)
            try:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).write_bytes(content)
            except OSError as error:
                raise no_room(error) from None
        try:
            yield copy
        except FlashError as error:
            error.args = tuple(_renamed(part, copy, folder) for part in error.args)
            raise


def name_themselves(tokenizer: Any, copy: Path, folder: Path) -> None:
    """Lets a library's tokenizer say, and read again, the files of `folder` instead of their copies.

    Those of sentencepiece read their vocabulary again when they are copied or pickled.
    """
    own = getattr(tokenizer, "_tokenizer", tokenizer)
    for place in (vars(own), getattr(own, "init_kwargs", {})):
        for name, value in place.items():
            place[name] = _renamed(value, copy, folder)


def _renamed(value: Any, copy: Path, folder: Path) -> Any:
    """A text with the path of `folder` where that of `copy` was, also where its white space was folded."""
    if isinstance(value, str):
        for path in (str(copy), " ".join(str(copy).split())):
            value = value.replace(path, str(folder))
    return value


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Removed at the end. Raises FlashError where there cannot be one."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="mlx-flash-")
    except OSError as error:
        raise no_room(error) from None
    with folder as name:
        yield Path(name)


def no_room(error: Exception) -> FlashError:
    """The error to raise where a temporary folder cannot be written to."""
    return FlashError(
        f"the system's folder for temporary files cannot take a copy of the model's small files: {reason_of(error)}. "
        "Make room there, or let TMPDIR name another folder."
    )
