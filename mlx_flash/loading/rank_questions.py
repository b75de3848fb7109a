"""What rank 0 and the other ranks say to each other while a model is loaded.

Rank 0 asks "plan": which model it is, how it is to be loaded, and a checksum that every machine's copy must have. Each
rank answers what it offers (`Capacity`). Rank 0 divides the model and asks "build" with the shares. Each rank loads its
own and fills its slots. "unload" frees them.
"""

from __future__ import annotations

import hashlib
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..flash.files import MANIFEST, is_store
from ..flash.plain_files import reading
from ..flash.safetensors_file import header_bytes
from ..source.checkpoint_files import weights_in
from .options import LoadOptions

CONFIGURATION = "config.json"
SAMPLE_BYTES = 1 << 16  # of the weights, at the beginning, in the middle and at the end of each file
SAME_EVERYWHERE = ("revision", "window", "threads", "prefill_chunk", "io", "verify", "images", "parallel")


def checksum_of(folder: Path) -> str:
    """A checksum of what tells a model from others: its configuration, and of every file of weights the header, the
    size, and samples of the weights, in which two trainings of one architecture differ.

    A store has all of that in its manifest. Raises CheckpointError or ReadError.
    """
    digest = hashlib.sha256()
    names = [MANIFEST] if is_store(folder) else [CONFIGURATION]
    for name in names:
        with reading(folder / name):
            digest.update((folder / name).read_bytes())
    for name in [] if is_store(folder) else weights_in(folder).names:
        with reading(folder / name, "its header"), (folder / name).open("rb") as file:
            try:
                header, size = header_bytes(file), (folder / name).stat().st_size
            except ValueError as error:
                raise CheckpointError(f"{folder / name}: {error}. Download the checkpoint again.") from None
            digest.update(f"\0{name}\0{size}\0".encode() + header)
            for position in (len(header), size // 2, max(0, size - SAMPLE_BYTES)):
                file.seek(position)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def compare(folder: Path, checksum: object) -> None:
    """Raises CheckpointError if another machine's copy of a model is not the one in `folder`."""
    if checksum_of(folder) != checksum:
        raise CheckpointError(
            f"{folder} is not the model that rank 0 has: its configuration or its weights differ. Copy rank 0's folder "
            "here, or download the same revision on both machines."
        )


def question(kind: str, name: str | None, folder: Path, options: LoadOptions, **more: Any) -> dict[str, Any]:
    """The value of the question "plan".

    kind: of the units that are shared out. name: what the user calls the model; None for the demo model. folder: where
    rank 0 reads it. more: what this kind of unit needs besides.
    """
    shared = {each: getattr(options, each) for each in SAME_EVERYWHERE}
    model = name if name is None or not Path(name).expanduser().is_dir() else str(Path(name).expanduser().resolve())
    own = {"model": model, "checksum": checksum_of(folder), "options": shared, "memory": options.budget}
    return {"kind": kind, "host": this_host(), **own, **more}


def this_host() -> str:
    """The machine's name, by which ranks know that they share its memory."""
    return socket.gethostname()


def on_host_of_rank_0(asked: dict[str, Any], size: int) -> tuple[int, int]:
    """How many of `size` ranks still divide this machine's memory, and the bytes that rank 0 has taken of it.

    asked: the value of the question "plan". Where rank 0 runs as well, it has planned, and the others plan now.
    """
    return (size - 1, int(asked["taken"])) if asked["host"] == this_host() else (1, 0)


def options_in(asked: dict[str, Any], memory: str | int | None) -> LoadOptions:
    """The options of another rank. memory: its own budget; None for that of rank 0. Raises UsageError."""
    options = replace(LoadOptions(**asked["options"]), memory=asked["memory"] if memory is None else memory)
    options.check()
    return replace(options, trials=False)


def tell_user(note: str) -> None:
    """Prints a note of another rank, which rank 0 shows with the rank's name before it."""
    print(note, flush=True)
