"""The output folder of a conversion, and the renames at the end. A kill at any moment loses nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mlx_flash.errors import UsageError
from mlx_flash.flash.files import FORMAT, MANIFEST, RECORD, Manifest, is_store
from mlx_flash.flash.plain_files import reading
from mlx_flash.flash.system import sync_to_disk


def is_our_store(folder: Path) -> bool:
    """Whether a folder is a store, even a damaged one. Other programs also write a file manifest.json."""
    path = folder / MANIFEST
    if not path.is_file():
        return False
    with reading(path):
        return (folder / Manifest.neurons_file).exists() or FORMAT.encode() in path.read_bytes()


def replaced_path(output: Path) -> Path:
    """The path of a store that is being replaced, between two renames."""
    return output.with_name(f".{output.name}.replaced")


def recover(output: Path) -> None:
    """Completes or undoes renames that a kill interrupted."""
    replaced = replaced_path(output)
    if replaced.is_dir():
        if is_store(output):
            shutil.rmtree(replaced)
        elif not output.exists():
            replaced.rename(output)
    if is_store(output):
        (output / RECORD).unlink(missing_ok=True)


def refuse_to_replace(output: Path, source: Path, overwrite: bool) -> None:
    """Raises UsageError if the output exists, unless it is an empty folder or, with `overwrite`, a store."""
    checkpoint = source.resolve()
    if output == checkpoint or output in checkpoint.parents:
        raise UsageError(f"--output {output} holds the checkpoint itself. Choose another --output.")
    if not output.exists():
        return
    if not output.is_dir():
        raise UsageError(f"--output {output} is a file. Choose another --output.")
    if is_our_store(output):
        if not overwrite:
            raise UsageError(
                f"{output} is already a complete store. Choose another --output, or replace it with --overwrite."
            )
    elif any(output.iterdir()):
        raise UsageError(f"{output} is a folder with other files in it, not a store. Choose another --output.")


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_to_disk(descriptor)
    finally:
        os.close(descriptor)


def publish(folder: Path, manifest: Manifest) -> None:
    """Makes sure that every file is on the disk, then writes the manifest, which makes the folder a store."""
    for name in manifest.files:
        fsync(folder / name)
    fsync(folder)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        file.flush()
        sync_to_disk(file.fileno())
    fsync(folder)
