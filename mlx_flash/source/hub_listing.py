"""What a Hugging Face repository holds, how much of it is in huggingface_hub's cache, and errors in our words."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConversionError, NoSpaceError, UsageError
from ..flash.files import MANIFEST, Manifest
from .checkpoint_files import MAX_SMALL_BYTES, about_gguf, further_templates, matching, small_files, weight_files

SPARE_BYTES = 64 << 20
ASK_SECONDS = 20  # After this time the Hub counts as unreachable.
PARTIAL = ".incomplete"  # how huggingface_hub names a file that is not whole yet
SIGN_IN = "run `hf auth login`, or set HF_TOKEN to a token from your settings on the Hub"

# (names of a repository's files, function that returns the text of one, name of the repository) -> files to download
Choose = Callable[[Collection[str], Callable[[str], str], object], list[str]]


@dataclass(frozen=True)
class Listing:
    """The files of a repository that are needed.

    sizes: file -> bytes. etags: file -> its name among the cache's blobs, for files whose name the Hub tells.
    """

    repository: str
    commit: str
    sizes: dict[str, int]
    etags: dict[str, str]

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())

    def here(self) -> int:
        """Bytes that are in the cache, those of files that are not whole included."""
        return sum(self._here(name) for name in self.sizes)

    def missing(self) -> dict[str, int]:
        """The sizes of the files that are not in the cache, or not wholly."""
        from huggingface_hub import try_to_load_from_cache

        found = {name: try_to_load_from_cache(self.repository, name, revision=self.commit) for name in self.sizes}
        return {name: size for name, size in self.sizes.items() if not isinstance(found[name], str)}

    def as_dict(self) -> dict[str, Any]:
        """Bytes in all and still to download, and the room for them, as `--json` prints them."""
        folder, free = free_space(self.repository)
        missing = max(0, self.nbytes - self.here())
        fits = missing + SPARE_BYTES <= free
        return {
            **{"bytes": self.nbytes, "missing_bytes": missing, "free_bytes": free, "fits": fits},
            "folder": str(folder),
        }

    def describe(self) -> str:
        """One sentence for the user."""
        told = self.as_dict()
        missing, free = told["missing_bytes"], told["free_bytes"]
        room = f"{told['folder']} has {free / 1e9:.2f} GB free"
        if not told["fits"]:
            room += ", which is too little"
        return (
            f"{self.repository}: {self.nbytes / 1e9:.2f} GB, of which {missing / 1e9:.2f} GB must be downloaded; {room}"
        )

    def _here(self, name: str) -> int:
        blob = blobs_folder(self.repository) / self.etags.get(name, name)
        for path in (blob, blob.with_name(blob.name + PARTIAL)):
            with contextlib.suppress(OSError):
                return min(path.stat().st_size, self.sizes[name])
        return 0


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
            f"{where} holds neither a store ({MANIFEST}, {Manifest.neurons_file}) nor a checkpoint (config.json). "
            f"{about_gguf(names)}".rstrip()
        )
    weights = weight_files(names, read, where)
    index = [weights.index] if weights.index else []
    return [*small_files(names), *further_templates(names), *index, *weights.names]


def ask_hub(repository: str, revision: str | None) -> Any:
    """The Hub's answer about a repository: commit, and files with sizes. Raises huggingface_hub's errors."""
    from huggingface_hub import HfApi

    return HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=ASK_SECONDS)


def listing_of(info: Any, repository: str, choose: Choose, read: Callable[[str], str]) -> Listing:
    """The Listing of what `choose` names. info: from `ask_hub`. read(name): returns the text of one of the files.

    Raises CheckpointError if a file of a kind that is small is not.
    """
    files = {file.rfilename: file for file in info.siblings}
    sizes = {name: file.size or 0 for name, file in files.items()}

    def read_small(name: str) -> str:
        _check_small(name, sizes[name], repository)
        return read(name)

    wanted = choose(sizes, read_small, repository)
    for name in [*small_files(wanted), *further_templates(wanted)]:
        _check_small(name, sizes[name], repository)
    etags = {name: _etag_of(files[name]) for name in wanted}
    return Listing(
        repository, info.sha, {name: sizes[name] for name in wanted}, {name: tag for name, tag in etags.items() if tag}
    )


def _etag_of(file: Any) -> str | None:
    """The name of a listed file among the cache's blobs, if the Hub tells it."""
    lfs = getattr(file, "lfs", None)
    return lfs.sha256 if lfs else getattr(file, "blob_id", None)


def _check_small(name: str, size: int, repository: str) -> None:
    if size > MAX_SMALL_BYTES:
        raise CheckpointError(
            f"{name} of {repository} has {size / 1e6:.0f} MB; a file of its kind has at most "
            f"{MAX_SMALL_BYTES >> 20} MiB. Nothing was downloaded."
        )


def blobs_folder(repository: str) -> Path:
    """Where huggingface_hub's cache keeps the files of a repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repository, repo_type="model")
    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / folder / "blobs"


def free_space(repository: str) -> tuple[Path, int]:
    """(a folder on the disk of the cache, its free bytes)."""
    blobs = blobs_folder(repository)
    above = next(folder for folder in (blobs, *blobs.parents) if folder.exists())
    return above, shutil.disk_usage(above).free


def check_free_space(repository: str, missing: dict[str, int]) -> None:
    """Raises NoSpaceError if the missing bytes of the files do not fit on the cache's disk."""
    needed = sum(missing.values()) - sum(path.stat().st_size for path in blobs_folder(repository).glob(f"*{PARTIAL}"))
    above, free = free_space(repository)
    if missing and free < needed + SPARE_BYTES:
        raise NoSpaceError(
            f"{repository} needs {needed / 1e9:.2f} GB more in {above}, where {free / 1e9:.2f} GB are free. Make "
            "room, or set HF_HOME to a folder on another disk."
        )


@contextlib.contextmanager
def in_our_words(repository: str, revision: str | None) -> Iterator[None]:
    """Turns the errors of huggingface_hub, its HTTP library and the disk into this package's.

    Raises UsageError (no such repository or revision, gated), NoSpaceError or ConversionError.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise UsageError(
            f"{repository} is gated. Accept its terms at {constants.ENDPOINT}/{repository}, then {SIGN_IN}."
        ) from None
    except RepositoryNotFoundError:
        raise UsageError(
            f"{repository} is neither a folder nor a Hugging Face repository. If the repository is private, {SIGN_IN}."
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


def why_unreachable(error: Exception) -> tuple[str, str]:
    """(why the Hub was not asked, what to do about it), from the error of `ask_hub`."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set", "Unset it to download."
    text = " ".join(str(error).split())
    return f"the Hub cannot be reached ({text or type(error).__name__})", "Are you online?"
