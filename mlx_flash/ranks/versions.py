"""What must be the same on all machines, since the text depends on it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ..errors import FlashError

PACKAGES = ("mlx-flash-runtime", "mlx", "mlx-lm")


def versions() -> dict[str, str]:
    return {package: _version(package) for package in PACKAGES}


def check_versions(name: str, found: object) -> None:
    """name: such as "rank 1 (mac2)". found: what `versions` gives there. Raises FlashError."""
    theirs = found if isinstance(found, dict) else {}
    for package, own in versions().items():
        if theirs.get(package) != own:
            raise FlashError(
                f"{name} has {package} {theirs.get(package)}, and rank 0 has {own}. Install the same versions on all "
                "machines."
            )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
