"""A checkpoint on the Hub without its weights: a folder that a plan can be made from before anything is downloaded.

Configuration, tokenizer and index are real. A safetensors file has its real header and its real length, and a hole in
place of its tensors, which takes no room on the disk. Nothing may be computed or measured with such a folder.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from queue import Empty, SimpleQueue

from ..errors import CheckpointError, ConversionError
from ..flash.files import Manifest
from ..flash.safetensors_file import MAX_HEADER_BYTES
from .checkpoint_files import further_templates, small_files
from .hub_listing import Listing, ask_hub, in_our_words, listing_of, wanted_files, why_unreachable

GUESS_BYTES = 100_000  # asked for at first; most headers are smaller
AT_ONCE = 8  # requests for headers
LEAST_PREFIX = 8  # bytes of the length that a header begins with


def skeleton_of(
    repository: str,
    revision: str | None,
    folder: Path,
    listed: Callable[[Listing], None] = lambda _: None,
) -> Listing:
    """Fills an empty folder with the skeleton of a repository's checkpoint or store.

    Small files come from huggingface_hub's cache where they are in it. Nothing is put there. listed: called with the
    files as soon as they are known.

    Raises UsageError (no such repository or revision, gated), CheckpointError (no model, or a malformed header), or
    ConversionError (the Hub cannot be reached).
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    with in_our_words(repository, revision):
        try:
            info = ask_hub(repository, revision)
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
            raise
        except Exception as error:
            why, remedy = why_unreachable(error)
            raise ConversionError(f"{repository} was not downloaded before, and {why}. {remedy}") from None

        def get(name: str) -> Path:
            return Path(hf_hub_download(repository, name, revision=info.sha, local_dir=folder))

        def read(name: str) -> str:
            return get(name).read_text(encoding="utf-8", errors="replace")

        listing = listing_of(info, repository, wanted_files, read)
        listed(listing)
        small = {*small_files(listing.sizes), *further_templates(listing.sizes)}
        small |= {name for name in listing.sizes if name.endswith((".index.json", Manifest.neurons_checksums_file))}
        headers = [name for name in listing.sizes if name.endswith(".safetensors")]
        most = MAX_HEADER_BYTES // max(1, len(headers))
        _at_once(get, sorted(small))
        _at_once(lambda name: (folder / name).write_bytes(_header(listing, name, most)), headers)
        for name in listing.sizes.keys() - small:
            with (folder / name).open("ab") as file:
                file.truncate(listing.sizes[name])
    return listing


def _at_once(do: Callable[[str], object], names: Collection[str]) -> None:
    """Calls a function with each name, in several threads. After an error, no further call begins.

    The threads are daemons, so that a process that is told to end does not wait for the network.
    """
    left: SimpleQueue[str] = SimpleQueue()
    ended: SimpleQueue[Exception | None] = SimpleQueue()
    for name in names:
        left.put(name)

    def work() -> None:
        with contextlib.suppress(Empty):
            while True:
                name = left.get_nowait()
                try:
                    do(name)
                    ended.put(None)
                except Exception as error:
                    ended.put(error)

    for _ in range(AT_ONCE):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in names:
            if (error := ended.get()) is not None:
                raise error
    finally:
        with contextlib.suppress(Empty):
            while left.get_nowait():
                pass


def _header(listing: Listing, name: str, most: int) -> bytes:
    """The header of a safetensors file on the Hub, with the length that it begins with. most: bytes that it may have.

    Raises CheckpointError for a length that no file of this size has.
    """
    size = listing.sizes[name]
    begin = _bytes_of(listing, name, 0, min(size, GUESS_BYTES))
    length = int.from_bytes(begin[:LEAST_PREFIX], "little")
    if len(begin) < LEAST_PREFIX or length > min(size - LEAST_PREFIX, max(most, GUESS_BYTES)):
        raise CheckpointError(
            f"{name} of {listing.repository} is not a valid safetensors file: its header claims {length} bytes, the "
            f"file has {size}. Nothing was downloaded."
        )
    if (missing := LEAST_PREFIX + length - len(begin)) > 0:
        begin += _bytes_of(listing, name, len(begin), missing)
    return begin[: LEAST_PREFIX + length]


def _bytes_of(listing: Listing, name: str, begin: int, count: int) -> bytes:
    """`count` bytes of a file on the Hub. Never reads more, even if the server sends the whole file."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(listing.repository, name, revision=listing.commit)
    wanted = {"Range": f"bytes={begin}-{begin + count - 1}", "Accept-Encoding": "identity"}
    got = bytearray()
    with get_session().stream("GET", url, headers={**build_hf_headers(), **wanted}, timeout=20) as response:
        hf_raise_for_status(response)
        if begin and response.status_code != 206:
            raise ConversionError(f"the Hub sends {name} of {listing.repository} only as a whole. Download it first.")
        for piece in response.iter_raw():
            got += piece
            if len(got) >= count:
                break
    if len(got) < count:
        raise ConversionError(f"the connection broke while the header of {name} was read. Run the same command again.")
    return bytes(got[:count])
