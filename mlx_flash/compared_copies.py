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

from .errors import FlashError
from .flash.plain_files import reading, reason_of

Compare = Callable[[Path, os.stat_result, bytes], None]


@contextlib.contextmanager
def compared_copies(folder: Path, names: Sequence[str], compare: Compare) -> Iterator[Path]:
    """A temporary folder with copies of some files of `folder`; an error that names it is raised with `folder`.

    names: of the files, below `folder`. compare: called with a file, its status when it was opened, and its bytes;
    raises what it finds.

    Raises ReadError for a file that cannot be read, FlashError if there is no room for the copies.
    """
    with _temporary_folder() as copy:
        for name in names:
            with reading(folder / name), (folder / name).open("rb") as file:
                status, content = os.fstat(file.fileno()), file.read()
            compare(folder / name, status, content)
            try:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).write_bytes(content)
            except OSError as error:
                raise _no_room(error) from None
        try:
            yield copy
        except FlashError as error:
            error.args = tuple(
                part.replace(str(copy), str(folder)) if isinstance(part, str) else part for part in error.args
            )
            raise


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(prefix="mlx-flash-")
    except OSError as error:
        raise _no_room(error) from None
    with folder as name:
        yield Path(name)


def _no_room(error: OSError) -> FlashError:
    return FlashError(
        f"the system's folder for temporary files cannot take a copy of the model's small files: {reason_of(error)}. "
        "Make room there, or let TMPDIR name another folder."
    )
