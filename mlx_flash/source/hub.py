"""A Hugging Face repository id -> a folder with the files that are needed, in huggingface_hub's own cache.

When a download is interrupted, huggingface_hub keeps whole files, but starts again with a file that was cut short.
With shards of many gigabytes, that is most of the work. So large files are downloaded here, into
`blobs/<etag>.incomplete` of its cache, where a later run resumes with an HTTP range request. huggingface_hub then finds
the finished files there and links them.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..errors import ConversionError
from ..flash.safetensors_file import sha256_of
from ..flash.system import sync_to_disk
from .hub_listing import (
    PARTIAL,
    Choose,
    Listing,
    ask_hub,
    blobs_folder,
    check_free_space,
    in_our_words,
    listing_of,
    wanted_files,
    why_unreachable,
)
from .ssd_writes import DOWNLOADS, count_written

LARGE_BYTES = 10_000_000  # Files of at least this size are resumed.
SHA256_DIGITS = 64  # The ETag of a file in large file storage is its checksum, with this many digits.


def download(
    repository: str,
    revision: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    choose: Choose = wanted_files,
    fetch: bool = True,
    listed: Callable[[Listing], None] = lambda _: None,
) -> Path:
    """The folder of a snapshot with the files that `choose` names: by default those of a store or a checkpoint.

    If the Hub cannot be reached, or without `fetch`, it is the snapshot that was downloaded before. listed: called
    before the first byte of weights is downloaded, if the Hub was asked. Raises UsageError (no such repository or
    revision, gated), CheckpointError (no checkpoint), NoSpaceError, or ConversionError if a download is needed and
    fails.
    """
    with in_our_words(repository, revision):
        if not fetch:
            return _downloaded_before(repository, revision, None, say, choose)
        return _download(repository, revision, say, choose, listed)


def _download(
    repository: str,
    revision: str | None,
    say: Callable[[str], None],
    choose: Choose,
    listed: Callable[[Listing], None],
) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = ask_hub(repository, revision)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise
    except Exception as error:  # no network, the Hub does not answer, HF_HUB_OFFLINE is set
        return _downloaded_before(repository, revision, error, say, choose)

    def read(name: str) -> str:
        return Path(hf_hub_download(repository, name, revision=info.sha)).read_text(encoding="utf-8", errors="replace")

    listing = listing_of(info, repository, choose, read)
    listed(listing)
    missing = listing.missing()
    check_free_space(repository, missing)
    for name, size in missing.items():
        if size >= LARGE_BYTES:
            _fetch(repository, name, info.sha, say)
    # Pass the name of the revision, so that the cache can resolve it later without a network.
    wanted = [glob.escape(name) for name in listing.sizes]
    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
    if small := sum(size for size in missing.values() if size < LARGE_BYTES):
        count_written(DOWNLOADS, small)
    if folder.name != info.sha:
        raise ConversionError(f"{repository} changed during the download. Run the same command again.")
    return folder


def discard_partial(repository: str) -> int:
    """Removes what an unfinished download left in the cache. Returns the bytes that this freed.

    These are files that are not whole, and whole ones that belong to no snapshot yet. Files that another process is
    downloading stay. Raises OSError.
    """
    from filelock import FileLock, Timeout

    blobs = blobs_folder(repository)
    linked = {path.resolve().name for path in blobs.parent.glob("snapshots/*/**/*") if path.is_symlink()}
    freed = 0
    for path in sorted(blobs.glob("*")):
        name = path.name.removesuffix(PARTIAL)
        if path.name in linked or not path.is_file():
            continue
        with contextlib.suppress(Timeout), FileLock(_lock_file(repository, name)).acquire(timeout=0):
            freed += path.stat().st_size
            path.unlink()
    return freed


def _downloaded_before(
    repository: str, revision: str | None, reason: Exception | None, say: Callable[[str], None], choose: Choose
) -> Path:
    """The snapshot in the cache, if it is complete. Raises ConversionError if it is not.

    reason: the error that prevents a download; None if no download was asked for.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled

    at = repository if revision is None else f"{repository} at {revision}"
    if reason is None:
        why = "this command downloads nothing"
        remedy = f"Download it with `mlxflash download {repository}`, or run the model once."
    else:
        why, remedy = why_unreachable(reason)
    try:
        # Ask for no files; the missing ones are found below.
        folder = Path(snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=[]))
        names = [file.path for file in get_cached_repo_tree(repository, revision=revision)]
    except LocalEntryNotFoundError:
        raise ConversionError(
            f"{at} is not a local folder and was not downloaded before, and {why}. {remedy}"
        ) from None
    except CachedRepoTreeNotFoundError:  # An older huggingface_hub downloaded it, without a list of its files.
        return folder
    try:
        wanted = choose(names, lambda name: (folder / name).read_text(encoding="utf-8"), repository)
        missing = [name for name in wanted if not (folder / name).is_file()]
    except FileNotFoundError as error:
        missing = [Path(error.filename).name]  # the index itself
    if missing:
        raise ConversionError(
            f"{at} was downloaded only in part (missing: {', '.join(missing[:3])}), and {why}. {remedy}"
        )
    if reason is not None and not isinstance(reason, OfflineModeIsEnabled):
        say(f"note: {why}; using the copy of {at} that was downloaded before")
    return folder


def _fetch(repository: str, name: str, commit: str, say: Callable[[str], None]) -> None:
    """Downloads one file into the cache's blobs; resumes a download that an earlier run began."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repository, name, revision=commit)
    found = get_hf_file_metadata(url)
    if found.etag is None or not found.etag.isalnum() or found.size is None:
        return  # an unusual answer for the Hub: leave it to huggingface_hub
    if found.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return  # too large for a single HTTP request: leave it to huggingface_hub, which has another way
    blob = blobs_folder(repository) / found.etag
    partial = blob.with_name(f"{found.etag}{PARTIAL}")
    with _download_lock(repository, found.etag, say):
        if blob.exists():
            return
        blob.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists() and partial.stat().st_size > found.size:
            partial.unlink()
        with partial.open("ab", buffering=0) as file:
            begin = file.tell()
            if begin:
                say(f"{name}: resuming after {begin / 1e6:.0f} of {found.size / 1e6:.0f} MB")
            try:
                http_get(
                    url,
                    file,  # type: ignore[arg-type]
                    resume_size=begin,
                    headers={**build_hf_headers(), "Accept-Encoding": "identity"},
                    expected_size=found.size,
                    displayed_filename=name,
                )
                sync_to_disk(file.fileno())
            finally:
                count_written(DOWNLOADS, file.tell() - begin)
        # After a power cut, the earlier part may have its full length but not its content.
        if begin and len(found.etag) == SHA256_DIGITS and sha256_of(partial) != found.etag:
            partial.unlink()
            raise ConversionError(f"{name} of {repository} arrived damaged. Run the same command again.")
        partial.replace(blob)


def _download_lock(repository: str, etag: str, say: Callable[[str], None]) -> AbstractContextManager[Any]:
    """The lock that huggingface_hub takes for the same file."""
    from filelock import FileLock, Timeout

    lock = FileLock(_lock_file(repository, etag))
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process that is downloading {repository}")
        return lock.acquire()


def _lock_file(repository: str, etag: str) -> Path:
    folder = blobs_folder(repository).parent
    path = folder.parent / ".locks" / folder.name / f"{etag}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
