"""Says whether PyPI has a newer MLX, mlx-lm or huggingface_hub than the project was tested with.

The versions tested are the lower bounds in pyproject.toml. A newer MLX may choose other Metal kernels, and the cache
writes into its memory: it is tried first, then let in. Exit code 1 if there is one, so that a scheduled run is seen.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
import urllib.request
from pathlib import Path

WATCHED = ("mlx", "mlx-lm", "huggingface_hub")


def tested(pyproject: Path) -> dict[str, str]:
    """The lower bound of each watched package."""
    requirements = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    found = (re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", requirement) for requirement in requirements)
    return {match[1]: match[2] for match in found if match and match[1] in WATCHED}


def numbers(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in re.findall(r"\d+", version)]
    while parts and parts[-1] == 0:  # 2.4 and 2.4.0 are one
        parts.pop()
    return tuple(parts)


def newest(package: str) -> str:
    with urllib.request.urlopen(f"https://pypi.org/pypi/{package}/json", timeout=60) as answer:
        return str(json.load(answer)["info"]["version"])


def main() -> int:
    newer = 0
    for package, version in tested(Path(__file__).parents[1] / "pyproject.toml").items():
        found = newest(package)
        later = numbers(found) > numbers(version)
        newer += later
        print(f"{'::warning::' if later else ''}{package}: tested with {version}, the newest is {found}")
    return 1 if newer else 0


if __name__ == "__main__":
    sys.exit(main())
