"""Copies a checkpoint's configuration, tokenizer and other small files, and notices if they change meanwhile."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from mlx_flash.errors import ConversionError
from mlx_flash.flash.plain_files import reading
from mlx_flash.flash.safetensors_file import sha256_of
from mlx_flash.source.checkpoint_files import files_in, small_files


class SmallCopies:
    """The small files of a checkpoint, as they were when the conversion began. sums: name -> SHA-256.

    Raises CheckpointError or ReadError.
    """

    def __init__(self, folder: Path, left_out: Callable[[str], bool]) -> None:
        """left_out: whether a file, by its name, is not copied."""
        self.sums: dict[str, str] = {}
        self._folder = folder
        for name in small_files(files_in(folder)):
            if not left_out(name):
                with reading(folder / name):
                    self.sums[name] = sha256_of(folder / name)

    def compare(self, path: Path, _: object, content: bytes) -> None:
        """Raises ConversionError if a small file of the checkpoint has changed since the conversion began."""
        if hashlib.sha256(content).hexdigest() != self.sums.get(path.name):
            raise ConversionError(f"{path} changed during the conversion. Run the same command again.")

    def copy_to(self, folder: Path) -> None:
        """Copies the files. Raises ConversionError or ReadError."""
        for name in self.sums:
            path = self._folder / name
            with reading(path):
                content = path.read_bytes()
            self.compare(path, None, content)
            (folder / name).write_bytes(content)
