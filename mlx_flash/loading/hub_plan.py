"""The plan of a repository on the Hub, before its weights are downloaded."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ..errors import CheckpointError, ConversionError, FlashError
from ..flash.files import is_store
from ..source.hub_listing import Listing
from ..source.resolve import find_checkpoint
from ..source.skeleton import skeleton_of
from .config import holds_mixture, read_config
from .load import planned_model
from .model_types import runs_as_it_is
from .options import LoadOptions
from .plan import Plan
from .planned import Planned


def is_downloaded(model: str, revision: str | None) -> bool:
    """Whether a model is a folder, or a repository that was downloaded wholly. The Hub is not asked.

    Raises UsageError for a name that is neither, and CheckpointError.
    """
    try:
        find_checkpoint(model, revision, fetch=False)
    except ConversionError:
        return False
    return True


def plan_before_download(
    repository: str, options: LoadOptions, listed: Callable[[Listing], None] = lambda _: None
) -> Plan | None:
    """The plan that `load` would follow once a repository is downloaded; None if that depends on a conversion.

    The arguments and errors are those of `planned_before_download`.
    """
    with planned_before_download(repository, options, listed) as planned:
        return None if planned is None else planned.plan


@contextlib.contextmanager
def planned_before_download(
    repository: str, options: LoadOptions, listed: Callable[[Listing], None] = lambda _: None
) -> Iterator[Planned | None]:
    """A repository's model as `load` would load it once it is downloaded; None if that depends on a conversion.

    Only headers and small files are read, and nothing is kept of them. The model's `foresight` measures with files that
    are not here; `Foresight.of_disk` gives one that does not. listed: called with the repository's files before the
    plan is made.

    Raises the errors of `plan` and those of `skeleton_of`.
    """
    # Threads may still write there when a signal ends the process.
    with tempfile.TemporaryDirectory(prefix="mlx_flash-skeleton-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        listing = skeleton_of(repository, options.revision, folder, listed)
        try:
            if not is_store(folder) and _needs_conversion(folder, listing):
                yield None
                return
            with planned_model(folder, replace(options, revision=None)) as planned:
                yield planned
        except FlashError as error:
            said = str(error).replace(f"{folder.resolve()}", repository).replace(name, repository)
            error.args = (said, *error.args[1:])
            raise


def _needs_conversion(folder: Path, listing: Listing) -> bool:
    """Whether a checkpoint must be converted before it runs. Raises the errors of a checkpoint that does not run."""
    in_torch_files = any(name.endswith(".bin") for name in listing.sizes)  # Nothing is known of what is in them.
    if not in_torch_files and holds_mixture(folder):
        return False
    as_it_is = runs_as_it_is(read_config(folder), folder)
    if as_it_is and in_torch_files:
        raise CheckpointError(
            f"{listing.repository} has only PyTorch files, but this model is read in place from safetensors files. "
            "Look for a checkpoint with *.safetensors."
        )
    return not as_it_is
