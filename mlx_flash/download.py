"""python -m mlx_flash.download: downloads a repository's model into huggingface_hub's cache, or continues to."""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from .cli.run import REVISION_HELP, add_lifeline_argument, obey_lifeline, program, run_command
from .cli.terminal import say

if TYPE_CHECKING:
    from .source.hub_listing import Listing

LOOK_SECONDS = 0.5  # between two looks at how much has arrived
RATE_SECONDS = 20  # the speed is that of the last so many seconds, because files grow in large pieces


class Arrived(NamedTuple):
    """How far a download is. The rate is in bytes per second; it and the time left are None before they are known."""

    done: int
    total: int
    rate: float | None
    seconds_left: float | None


class Meter:
    """Tells the speed of a download from how much of it is there, at several times."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._seen: deque[tuple[float, int]] = deque()

    def look(self, done: int, now: float) -> Arrived:
        """done: bytes that are there. now: seconds, on any clock that only goes forward."""
        self._seen.append((now, done))
        while now - self._seen[0][0] > RATE_SECONDS:
            self._seen.popleft()
        (began, before), left = self._seen[0], self._total - done
        rate = max(0, done - before) / (now - began) if now > began else None
        return Arrived(done, self._total, rate, left / rate if rate else None)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("download"),
        description="Downloads the files of a model from the Hugging Face Hub into its cache, where every command "
        "finds them. Other formats of the same weights are left out. An interrupted download continues where it was "
        "when it is started again. `mlxflash plan --model OWNER/NAME` says before whether the model runs, and in how "
        "much memory.",
    )
    parser.add_argument("repository", metavar="OWNER/NAME", help="id of a Hugging Face repository")
    parser.add_argument("--revision", help=REVISION_HELP)
    parser.add_argument(
        "--discard",
        action="store_true",
        help="download nothing; remove what an unfinished download of the repository left",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print a JSON object twice a second, with done and total (bytes), rate (bytes per second) and "
        "seconds_left; the last one has the folder instead",
    )
    add_lifeline_argument(parser)
    return parser


def main(arguments: argparse.Namespace) -> None:
    from huggingface_hub.utils import disable_progress_bars

    from .source.hub import discard_partial, download

    obey_lifeline(arguments)
    disable_progress_bars()
    if arguments.discard:
        freed = discard_partial(arguments.repository)
        print(json.dumps({"freed": freed}) if arguments.json else f"{freed / 1e9:.2f} GB freed")
        return
    with _shown(arguments.json) as listed:
        try:
            folder = download(arguments.repository, arguments.revision, say, listed=listed)
        except KeyboardInterrupt:
            say("\nWhat has arrived is kept. Run the same command again to continue, with --discard to remove it.")
            raise
    if arguments.json:
        print(json.dumps({"folder": str(folder)}))
    else:
        print(f"{folder}\n`mlxflash chat --model {arguments.repository}` talks with it.")


@contextmanager
def _shown(as_json: bool) -> Iterator[Callable[[Listing], None]]:
    """Yields a function that starts to show the progress of a listing's download, until the context ends."""
    from tqdm import tqdm

    ended = threading.Event()
    threads: list[threading.Thread] = []

    def follow(listing: Listing) -> None:
        meter = Meter(listing.nbytes)
        with tqdm(
            total=listing.nbytes,
            initial=listing.here(),
            unit="B",
            unit_scale=True,
            desc=listing.repository,
            disable=True if as_json else None,  # None: where standard error is not a terminal
        ) as bar:
            while True:
                last = ended.is_set()
                progress = meter.look(listing.here(), time.monotonic())
                if as_json:
                    print(json.dumps(progress._asdict()), flush=True)
                bar.update(progress.done - bar.n)
                if last:
                    return
                ended.wait(LOOK_SECONDS)

    def listed(listing: Listing) -> None:
        if not as_json:
            say(listing.describe())
        threads.append(threading.Thread(target=follow, args=(listing,), daemon=True))
        threads[-1].start()

    try:
        yield listed
    finally:
        ended.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    run_command(make_parser(), main)
