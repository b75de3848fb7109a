"""A Hugging Face repository id -> a folder with the files that are needed, in huggingface_hub's own cache.

When a download is interrupted, huggingface_hub keeps whole files, but starts again with a file that was cut short.
With shards of many gigabytes, that is most of the work. So large files are downloaded here, into
`blobs/<etag>.incomplete` of its cache, where a later run resumes with an HTTP range request. huggingface_hub then finds
the finished files there and links them.
"""

from __future__ import annotations

import errno
import glob
import shutil
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConversionError, NoSpaceError, UsageError
from ..flash.files import MANIFEST, Manifest
from ..flash.safetensors_file import sha256_of
from ..flash.system import sync_to_disk
from .checkpoint_files import MAX_SMALL_BYTES, further_templates, matching, small_files, weight_files

LARGE_BYTES = 10_000_000  # Files of at least this size are resumed.
SPARE_BYTES = 64 << 20
ASK_SECONDS = 20  # After this time the Hub counts as unreachable.
SHA256_DIGITS = 64  # The ETag of a file in large file storage is its checksum, with this many digits.

# (names of a repository's files, function that returns the text of one, name of the repository) -> files to download
Choose = Callable[[Collection[str], Callable[[str], str], object], list[str]]


def wanted_files(names: Collection[str], read: Callable[[str], str], where: object) -> list[str]:
    """The files of a repository to download: those of its store, or else of its checkpoint.

    If it has the weights in several formats, one is chosen. read(name): returns the text of an index. Raises
    CheckpointError if there is neither a store nor a checkpoint.
    """
    if MANIFEST in names and Manifest.neurons_file in names:
        parts = [Manifest.neurons_file, Manifest.neurons_checksums_file, Manifest.resident_file]
        parts.append(Manifest.predictor_file("*"))
        return sorted({*small_files(names), *matching(names, parts)})
    if "config.json" not in names:
        raise CheckpointError(
            f"{where} holds neither a store ({MANIFEST}, {Manifest.neurons_file}) nor a checkpoint (config.json)."
        )
    weights = weight_files(names, read, where)
    index = [weights.index] if weights.index else []
    return [*small_files(names), *further_templates(names), *index, *weights.names]


def download(
    repository: str,
    revision: str | None = None,
    say: Callable[[str], None] = lambda _: None,
    choose: Choose = wanted_files,
    fetch: bool = True,
) -> Path:
    """The folder of a snapshot with the files that `choose` names: by default those of a store or a checkpoint.

    If the Hub cannot be reached, or without `fetch`, it is the snapshot that was downloaded before. Raises UsageError
    (no such repository or revision, gated), CheckpointError (no checkpoint), NoSpaceError, or ConversionError if a
    download is needed and fails.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        if not fetch:
            return _downloaded_before(repository, revision, None, say, choose)
        return _download(repository, revision, say, choose)
    except GatedRepoError:
        raise UsageError(
            f"{repository} is gated. Accept its terms at {constants.ENDPOINT}/{repository}, then run `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise UsageError(
            f"{repository} is neither a folder nor a Hugging Face repository. If the repository is private, run "
            "`hf auth login` first."
        ) from None
    except RevisionNotFoundError:
        raise UsageError(
            f"{repository} has no revision {revision}; expected the name of a branch or a tag, or a full commit hash."
        ) from None
    except HFValidationError:
        raise UsageError(f"{repository} is neither a folder nor a Hugging Face repository id (owner/name).") from None
    except (CheckpointError, ConversionError, UsageError):
        raise
    except Exception as error:  # huggingface_hub, its HTTP library and the disk raise a dozen unrelated kinds.
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"the disk of {constants.HF_HUB_CACHE} is full; the files downloaded so far are kept. Make room and "
                "run the same command again to continue, or set HF_HOME to a folder on another disk."
            ) from None
        text = " ".join(str(error).split())  # Some messages have several lines.
        raise ConversionError(
            f"downloading {repository} failed: {text or type(error).__name__}. Run the same command again to continue."
        ) from None


def _download(repository: str, revision: str | None, say: Callable[[str], None], choose: Choose) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=ASK_SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise
    except Exception as error:  # no network, the Hub does not answer, HF_HUB_OFFLINE is set
        return _downloaded_before(repository, revision, error, say, choose)
    commit, sizes = info.sha, {file.rfilename: file.size or 0 for file in info.siblings}

    def read(name: str) -> str:
        return Path(hf_hub_download(repository, name, revision=commit)).read_text(encoding="utf-8", errors="replace")

    wanted = choose(sizes, read, repository)
    for name in [*small_files(wanted), *further_templates(wanted)]:
        if sizes[name] > MAX_SMALL_BYTES:
            raise CheckpointError(
                f"{name} of {repository} has {sizes[name] / 1e6:.0f} MB; a file of its kind has at most "
                f"{MAX_SMALL_BYTES >> 20} MiB. Nothing was downloaded."
            )
    missing = {
        name: sizes[name]
        for name in wanted
        if not isinstance(try_to_load_from_cache(repository, name, revision=commit), str)
    }
    _check_free_space(repository, missing)
    for name, size in missing.items():
        if size >= LARGE_BYTES:
            _fetch(repository, name, commit, say)
    # Pass the name of the revision, so that the cache can resolve it later without a network.
    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=[glob.escape(w) for w in wanted]))
    if folder.name != commit:
        raise ConversionError(f"{repository} changed during the download. Run the same command again.")
    return folder


def _downloaded_before(
    repository: str, revision: str | None, reason: Exception | None, say: Callable[[str], None], choose: Choose
) -> Path:
    """The snapshot in the cache, if it is complete. Raises ConversionError if it is not.

    reason: the error that prevents a download; None if no download was asked for.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError, OfflineModeIsEnabled

    offline = isinstance(reason, OfflineModeIsEnabled)
    at = repository if revision is None else f"{repository} at {revision}"
    if reason is None:
        why, remedy = (
            "this command downloads nothing",
            f"Download it with `hf download {repository}`, or run the model once.",
        )
    elif offline:
        why, remedy = "HF_HUB_OFFLINE is set", "Unset it to download."
    else:
        text = " ".join(str(reason).split())
        why, remedy = f"the Hub cannot be reached ({text or type(reason).__name__})", "Are you online?"
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
    if reason is not None and not offline:
        say(f"note: {why}; using the copy of {at} that was downloaded before")
    return folder


def _check_free_space(repository: str, missing: dict[str, int]) -> None:
    """Raises NoSpaceError if the missing bytes of the files do not fit on the cache's disk."""
    blobs = _blobs_folder(repository)
    needed = sum(missing.values()) - sum(path.stat().st_size for path in blobs.glob("*.incomplete"))
    above = next(folder for folder in (blobs, *blobs.parents) if folder.exists())
    free = shutil.disk_usage(above).free
    if missing and free < needed + SPARE_BYTES:
        raise NoSpaceError(
            f"{repository} needs {needed / 1e9:.2f} GB more in {above}, where {free / 1e9:.2f} GB are free. Make "
            "room, or set HF_HOME to a folder on another disk."
        )


def _blobs_folder(repository: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repository, repo_type="model")
    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / folder / "blobs"


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
    blob = _blobs_folder(repository) / found.etag
    partial = blob.with_name(f"{found.etag}.incomplete")
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
            http_get(
                url,
                file,  # type: ignore[arg-type]
                resume_size=begin,
                headers={**build_hf_headers(), "Accept-Encoding": "identity"},
                expected_size=found.size,
                displayed_filename=name,
            )
            sync_to_disk(file.fileno())
        # After a power cut, the earlier part may have its full length but not its content.
        if begin and len(found.etag) == SHA256_DIGITS and sha256_of(partial) != found.etag:
            partial.unlink()
            raise ConversionError(f"{name} of {repository} arrived damaged. Run the same command again.")
        partial.replace(blob)


def _download_lock(repository: str, etag: str, say: Callable[[str], None]) -> AbstractContextManager[Any]:
    """The lock that huggingface_hub takes for the same file."""
    from filelock import FileLock, Timeout

    folder = _blobs_folder(repository).parent
    path = folder.parent / ".locks" / folder.name / f"{etag}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        say(f"waiting for another process that is downloading {repository}")
        return lock.acquire()
