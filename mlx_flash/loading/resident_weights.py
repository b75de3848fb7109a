"""Opens a checkpoint's files, reads the weights that stay in memory, and compares what is read with checksums."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import ReadError, UnsupportedModelError
from ..flash.host_arrays import to_bytes
from ..flash.plain_files import reading, unreadable
from ..flash.safetensors_file import crc32_of, read_header
from ..flash.table_rows import summed_segments
from ..flash.unit_file import UnitFile
from ..flash.unit_sums import Ranges, RangeSums
from .in_place_model import InPlaceModel
from .load_progress import tell_progress
from .moves import primitives_of
from .verification import differs


def open_files(files: Sequence[Path], direct: bool) -> list[UnitFile]:
    """Opens all files, or none if one cannot be opened. direct: read past the page cache, where the disk allows it."""
    opened: list[UnitFile] = []
    try:
        for file in files:
            opened.append(UnitFile(file, direct))
    except BaseException:
        for unit in opened:
            unit.close()
        raise
    return opened


def ranges_in(mixture: InPlaceModel, files: Sequence[UnitFile]) -> list[Ranges]:
    """The ranges that are read of each file of a mixture: its header, its units' parts, its other tensors.

    Raises ReadError, also for a header that changed after the model was built.
    """
    tensors = [tensor for layer in mixture.switches.values() for tensor in layer.values()]
    segments = [tensor.segments for layer in mixture.layers for tensor in layer.tensors]
    rows = [found for table in mixture.lookup_tables for found in summed_segments(table.tensors)]
    of_layers = {name for layer in mixture.layers for name in layer.names()}
    read_apart = mixture.behind(mixture.of_experts() | mixture.of_tables() | of_layers)
    found = []
    for number, file in enumerate(files):
        header = _header_of(mixture, number, file)
        counted = {name: entry for name, (holder, entry) in mixture.entries.items() if holder == number}
        others = [entry for name, entry in counted.items() if name not in read_apart]
        offsets = [tensor.offsets[tensor.file_of == number] for tensor in tensors]
        lengths = [np.full(len(here), tensor.nbytes) for here, tensor in zip(offsets, tensors, strict=True)]
        offsets += [here[here[:, 0] == number, 1] for here in segments]
        lengths += [here[here[:, 0] == number, 2] for here in segments]
        offsets += [here for holder, here, _ in rows if holder == number]
        lengths += [here for holder, _, here in rows if holder == number]
        offsets.append(np.array([0, *(entry.begin for entry in others)]))
        lengths.append(np.array([len(header), *(entry.end - entry.begin for entry in others)]))
        found.append(Ranges.of_units(np.concatenate(offsets), np.concatenate(lengths)))
    return found


def _header_of(mixture: InPlaceModel, number: int, file: UnitFile) -> bytes:
    """The header of a mixture's file, read again. Raises ReadError if the model was built from another one."""
    counted = {name: entry for name, (holder, entry) in mixture.entries.items() if holder == number}
    with reading(file.path, "its header"):
        try:
            header, entries = read_header(file.path)
        except ValueError:
            raise differs(file.path, "its header") from None
    if not counted.items() <= entries.items():
        raise differs(file.path, "its header")
    return header


def compare_headers(mixture: InPlaceModel, files: Sequence[UnitFile]) -> None:
    """Compares the headers that the model was built from with the sums of the files. Raises ReadError."""
    for number, file in enumerate(files):
        if not _matches(file, 0, _header_of(mixture, number, file)):
            raise differs(file.path, "its header")


def _matches(file: UnitFile, offset: int, found: bytes | memoryview) -> bool:
    """Whether bytes match the sums of a file at `offset`."""
    assert isinstance(file.sums, RangeSums)
    try:
        checks = file.sums.within(offset, len(found))
    except ValueError:  # the file has no sums for this range
        return False
    return all(zlib.crc32(found[at : at + count]) == expected for at, count, expected in checks.tolist())


def read_resident(mixture: InPlaceModel, files: Sequence[UnitFile] | None = None) -> None:
    """Reads every parameter that stays in memory, tensor by tensor, the largest first.

    files: the mixture's files, whose sums are compared with all tensors; None to compare nothing.
    Raises ReadError, or UnsupportedModelError if a tensor cannot be compared.
    """
    from tqdm import tqdm

    if files is None:
        mixture.tensors.clear()  # each would stay in memory beside the arrays made of it
    known = {source for names in mixture.sources.values() for source in names}
    unknown = [name for name in mixture.tensors if name not in known]
    arrays = sorted(mixture.resident(), key=lambda item: item[1].nbytes, reverse=True)
    total, done = sum(array.nbytes for _, array in arrays), 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=total < 500e6, leave=False) as bar:
        for name, array in arrays:
            try:
                mx.eval(array)
            except RuntimeError as error:  # MLX names neither file nor tensor
                raise _unreadable(mixture, name, error) from None
            if files is not None:
                _compare_read(mixture, files, mixture.sources.get(name, unknown))
            bar.update(array.nbytes)
            done += array.nbytes
            tell_progress("reading weights", done, total)
    if files is not None:
        of_streamed = mixture.behind(mixture.streamed)
        _compare_read(mixture, files, [name for name in mixture.tensors if name not in of_streamed])
        for name, tensor in mixture.tensors.items():
            if name in of_streamed and not primitives_of(tensor):
                raise UnsupportedModelError(
                    f"{mixture.files[0].parent}: mlx-lm makes more than experts of {name}, and --verify cannot compare "
                    "the bytes that it reads of it. Run it without --verify."
                )
    mixture.tensors.clear()


def _compare_read(mixture: InPlaceModel, files: Sequence[UnitFile], names: Sequence[str]) -> None:
    """Compares the checkpoint's tensors that were read with their sums, and releases them. Raises ReadError."""
    for name in names:
        if (tensor := mixture.tensors.get(name)) is not None and not primitives_of(tensor):
            number, entry = mixture.entries[name]
            if not _matches(files[number], entry.begin, to_bytes(tensor).data):
                raise differs(files[number].path, f"tensor {name}")
            del mixture.tensors[name], tensor


def _unreadable(mixture: InPlaceModel, parameter: str, error: RuntimeError) -> ReadError:
    """The error for a parameter that cannot be read. It names the parameter's tensor, or the first unreadable one."""
    of_streamed = mixture.behind(mixture.streamed)
    wanted = mixture.sources.get(parameter)
    known: list[tuple[Path, str]] = []
    for path in mixture.files:
        try:
            with reading(path):
                entries = read_header(path)[1]
                names = [name for name in entries if name in (wanted or entries.keys() - of_streamed)]
                known += [(path, name) for name in names]
            for name in names:
                with reading(path, f"tensor {name}"), path.open("rb") as file:
                    file.seek(entries[name].begin)
                    crc32_of(file, entries[name].end - entries[name].begin)
        except ReadError as found:
            return found
        except ValueError as changed:
            return unreadable(path, EOFError(str(changed)))
    if wanted and known:
        return unreadable(known[0][0], error, f"tensor {known[0][1]}")
    return unreadable(mixture.files[0].parent, error, f"a tensor of {parameter}")
