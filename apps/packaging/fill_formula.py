"""Writes the Homebrew formula of a release: `fill_formula.py WHEEL --repository OWNER/NAME > mlxflash.rb`."""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path

TEMPLATE = Path(__file__).with_name("mlxflash.rb.in")
WHEEL = re.compile(r"mlx_flash_runtime-(?P<version>[\w.]+)-py3-none-macosx_\d+_\d+_arm64\.whl")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def filled(wheel: Path, repository: str) -> str:
    """The formula for the wheel of macOS, as it lies among a release's files. Raises ValueError for another file."""
    if (found := WHEEL.fullmatch(wheel.name)) is None:
        raise ValueError(f"{wheel.name} is not the wheel for macOS on Apple silicon")
    if REPOSITORY.fullmatch(repository) is None:
        raise ValueError(f"{repository!r} is not a repository, such as OWNER/NAME")
    home = f"https://github.com/{repository}"
    values = {
        "HOMEPAGE": home,
        "URL": f"{home}/releases/download/v{found['version']}/{wheel.name}",
        "VERSION": found["version"],
        "SHA256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "WHEEL": wheel.name,
    }
    return re.sub(r"@([A-Z][A-Z0-9]*)@", lambda name: values[name[1]], TEMPLATE.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="fill_formula.py", description="Prints the Homebrew formula of a release.")
    parser.add_argument("wheel", type=Path, help="the release's wheel for macOS")
    parser.add_argument("--repository", required=True, metavar="OWNER/NAME", help="where the release is")
    arguments = parser.parse_args()
    try:
        print(filled(arguments.wheel, arguments.repository), end="")
    except (OSError, ValueError) as error:
        sys.exit(f"fill_formula.py: {error}")


if __name__ == "__main__":
    main()
