"""python -m mlx_flash.check: verifies every byte of a store."""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .cli.run import program, run_command
from .errors import CorruptStoreError, UsageError
from .flash.files import MANIFEST, Manifest, NeuronLayout, parse_manifest
from .flash.safetensors_file import CHUNK_BYTES, crc32_of, read_header, sha256_of
from .source.checkpoint_files import matching

SHOWN = 20  # number of findings to print; the rest is only counted


@dataclass(frozen=True)
class Damage:
    """A finding: the file, the place in it ("layer 3, neurons 24-31", "tensor x", "header", ""), and the fault."""

    file: str
    where: str
    what: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.where, self.what) if part)


def check_store(folder: Path, progress: Callable[[int], None] = lambda _: None) -> list[Damage]:
    """Reads every file of the store and compares it with its checksums. Returns all findings; none if it is whole.

    progress: called with the number of bytes read since its last call. Memory use is some MiB, whatever the store's
    size. Raises NotAStoreError, NewerFormatError, OlderFormatError.
    """
    try:
        manifest = parse_manifest(folder)
    except CorruptStoreError as error:
        return [Damage(MANIFEST, "", str(error))]
    found: list[Damage] = []
    for name, entry in manifest.files.items():
        path = folder / name
        try:
            if not path.is_file():
                found.append(Damage(name, "", f"is missing ({entry['bytes']} bytes)"))
                continue
            if (size := path.stat().st_size) != entry["bytes"]:
                found.append(Damage(name, "", f"has {size} bytes, expected {entry['bytes']}"))
            if name == Manifest.neurons_file:
                sha256 = manifest.files[Manifest.neurons_checksums_file]["sha256"]
                found += _check_neurons(folder, manifest.layout, sha256, progress)
            elif size != entry["bytes"]:  # The checksums cannot match; only count its bytes.
                progress(entry["bytes"])
            elif "crc32" in entry:
                found += _check_tensors(path, entry["crc32"], progress)
            else:
                if sha256_of(path) != entry["sha256"]:
                    found.append(Damage(name, "", "does not match its checksum"))
                progress(size)
        except OSError as error:
            found.append(Damage(name, "", f"cannot be read ({error})"))
    return found


def unlisted_files(folder: Path) -> list[str]:
    """Names of files in the store's folder that its manifest does not list, without hidden ones such as macOS makes."""
    known = {MANIFEST, *parse_manifest(folder).files}
    return [name for name in matching([path.name for path in folder.iterdir()], ("*",)) if name not in known]


def _check_tensors(path: Path, sums: dict[str, int], progress: Callable[[int], None]) -> Iterator[Damage]:
    try:
        header, entries = read_header(path)
    except ValueError as error:
        yield Damage(path.name, "header", str(error))
        return
    progress(len(header))
    if zlib.crc32(header) != sums.get(""):
        # Its offsets cannot be trusted, so the tensors cannot be checked.
        yield Damage(path.name, "header", "does not match its checksum")
        return
    for name in sums.keys() - entries.keys() - {""}:
        yield Damage(path.name, f"tensor {name}", "is not in the file")
    with path.open("rb") as file:
        for name, entry in entries.items():
            where = f"tensor {name}"
            file.seek(entry.begin)
            try:
                crc, count = crc32_of(file, entry.end - entry.begin)
            except OSError as error:
                yield Damage(path.name, where, f"cannot be read ({error})")
                continue
            progress(count)
            if name not in sums:
                yield Damage(path.name, where, "has no checksum in the manifest")
            elif crc != sums[name]:
                yield Damage(path.name, where, "does not match its checksum")


def _check_neurons(
    folder: Path, layout: NeuronLayout, sha256: str, progress: Callable[[int], None]
) -> Iterator[Damage]:
    """Yields the damage in the neurons' file. sha256: of the table of checksums, from the manifest."""
    table = folder / Manifest.neurons_checksums_file
    if not table.is_file():
        yield Damage(Manifest.neurons_file, "", f"cannot be checked without {table.name}")
        return
    what = f"does not match its checksum in {table.name}"
    if sha256_of(table) != sha256:
        what += ", which is itself damaged"
    with (folder / Manifest.neurons_file).open("rb", CHUNK_BYTES) as file, table.open("rb") as sums:
        for layer in range(layout.layers):
            sums.seek(layer * layout.blocks * 4)
            file.seek(layer * layout.layer_bytes)
            try:
                for where, wrong in _check_layer(file, sums, layout, layer, progress):
                    yield Damage(Manifest.neurons_file, where, wrong or what)
            except OSError as error:
                yield Damage(Manifest.neurons_file, f"layer {layer}", f"cannot be read ({error})")
            except EOFError as error:
                yield Damage(Manifest.neurons_file, f"layer {layer}", f"{error}; nothing after it was checked")
                return


def _check_layer(
    file: BinaryIO, sums: BinaryIO, layout: NeuronLayout, layer: int, progress: Callable[[int], None]
) -> Iterator[tuple[str, str]]:
    """Yields (place, fault); "" is a checksum that does not match. Raises EOFError if either file is too short."""
    bad_from: int | None = None  # Adjacent damaged blocks are one finding.
    read = 0
    for block in range(layout.blocks):
        expected = sums.read(4)
        crc, count = crc32_of(file, layout.block_bytes)
        bad = crc != int.from_bytes(expected, "little")
        ended = len(expected) < 4 or count < layout.block_bytes
        if bad_from is not None and (ended or not bad):
            yield layout.name_blocks(layer, bad_from, block), ""
            bad_from = None
        if ended:
            name = Manifest.neurons_checksums_file if len(expected) < 4 else Manifest.neurons_file
            raise EOFError(f"{name} ends before neuron {block * layout.neurons_per_block}")
        if bad and bad_from is None:
            bad_from = block
        read += count
        if read >= CHUNK_BYTES:
            progress(read)
            read = 0
    if bad_from is not None:
        yield layout.name_blocks(layer, bad_from, layout.blocks), ""
    padding = file.read(layout.layer_bytes - layout.blocks * layout.block_bytes)
    progress(read + len(padding))
    if any(padding):
        yield f"padding after layer {layer}", "is not zero"
    if len(padding) < layout.layer_bytes - layout.blocks * layout.block_bytes:
        raise EOFError(f"{Manifest.neurons_file} ends in the padding")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("check"),
        description="Verifies every byte of a store against its checksums and names each damaged place. Exit code 0: "
        "no damage; 1: damage, or not a store; 2: wrong usage.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of a store")
    return parser


def main(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    folder: Path = arguments.folder
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}. Give the folder of a store.")
    try:
        sizes = [entry["bytes"] for entry in parse_manifest(folder).files.values()]
    except CorruptStoreError:
        sizes = []  # check_store reports it
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="checking", dynamic_ncols=True) as bar:
        found = check_store(folder, bar.update)
    for damage in found[:SHOWN]:
        print(damage)
    if len(found) > SHOWN:
        print(f"... and {len(found) - SHOWN} more")
    if sizes:
        for name in unlisted_files(folder):
            print(f"warning: {name} is not part of the store", file=sys.stderr)
    if found:
        print(f"{folder}: damaged. Convert the checkpoint again, or copy the store again.")
        return 1
    total = sum(sizes) + (folder / MANIFEST).stat().st_size
    print(f"{folder}: {len(sizes) + 1} files, {total / 1e9:.2f} GB, no damage")
    return 0


if __name__ == "__main__":
    run_command(make_parser(), main)
