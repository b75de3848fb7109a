"""python -m mlx_flash.cache: lists what this package keeps in its cache folder, and removes entries on request."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .cli.run import program, run_command
from .errors import UsageError

if TYPE_CHECKING:
    from .source.cached import Entry


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("cache"),
        description="Lists the entries of the cache folder ($MLX_FLASH_CACHE, or the system's own): stores, unfinished "
        "conversions, block sums of `--verify`, disk speeds, bytes written per day, results of trials, how often units "
        "were used, plans of models, the history of `chat`, the latest error report, the server's conversations, and "
        "leftovers of an interrupted removal, benchmark or measurement of the disk. Entries in use are never removed; "
        "the exit code is then 1.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--remove", nargs="+", metavar="NAME", help="remove these entries, by their names in the list")
    what.add_argument(
        "--superseded", action="store_true", help="remove stores that a newer one of the same checkpoint replaces"
    )
    what.add_argument("--all", action="store_true", help="remove everything in the list")
    parser.add_argument("--yes", action="store_true", help="do not ask before removing")
    return parser


def main(arguments: argparse.Namespace) -> int:
    from .flash.plain_files import reason_of
    from .source.cached import cache_folder, entries, remove

    folder = cache_folder()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"the cache folder {folder} is a file. Set MLX_FLASH_CACHE to a folder.")
    found = entries(folder)
    if arguments.remove:
        known = {entry.name: entry for entry in found}
        if lacking := [name for name in arguments.remove if name not in known]:
            raise UsageError(f"{folder} has no entry {lacking[0]!r}. `{program('cache')}` lists the entries.")
        chosen = [known[name] for name in dict.fromkeys(arguments.remove)]
    elif arguments.superseded or arguments.all:
        chosen = [entry for entry in found if arguments.all or entry.superseded]
    else:
        _print_list(found, folder)
        return 0
    if not chosen:
        print("nothing to remove")
        return 0
    if not arguments.yes and not _agreed(chosen):
        print("nothing was removed")
        return 1

    def freed(entry: Entry) -> int:
        try:
            if not remove(entry):
                print(f"{entry.name} is in use and was not removed", file=sys.stderr)
                return 0
        except OSError as error:
            print(f"{entry.name} cannot be removed: {reason_of(error)}", file=sys.stderr)
            return 0
        print(f"removed {entry.name}")
        return entry.nbytes

    sizes = [freed(entry) for entry in chosen]
    print(f"{sum(sizes) / 1e9:.2f} GB freed")
    return 0 if all(sizes) else 1


def _print_list(found: list[Entry], folder: Path) -> None:
    width = max((len(entry.name) for entry in found), default=0)
    for entry in found:
        day = time.strftime("%Y-%m-%d", time.localtime(entry.used))
        mark = " superseded," if entry.superseded else ""
        source = f" of {entry.source}" if entry.source else ""
        print(f"{entry.name:<{width}}  {entry.nbytes / 1e9:8.2f} GB  {day} {mark} {entry.kind}{source}")
    print(f"{folder}: {sum(entry.nbytes for entry in found) / 1e9:.2f} GB")


def _agreed(chosen: list[Entry]) -> bool:
    size = sum(entry.nbytes for entry in chosen) / 1e9
    if not sys.stdin.isatty():
        raise UsageError(
            f"removing {len(chosen)} ({size:.2f} GB) needs a confirmation, and there is no terminal. Add --yes."
        )
    for entry in chosen:
        print(f"  {entry.name} ({entry.kind})")
    try:
        return input(f"Remove {size:.2f} GB? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


if __name__ == "__main__":
    run_command(make_parser(), main)
