"""python -m mlx_flash.service.start [--log=FILE] [--key=FILE] -- FLAGS: what the system starts: the server, with a log.

Standard output and standard error go to the log, whose size is bounded: neither launchd nor systemd bounds a file. The
API key comes from a file, because other users see a process's arguments.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import threading
import time
from pathlib import Path

from .. import __version__
from ..defaults import KEY_VARIABLE

LOG_BYTES = 2 << 20  # one older file of this size is kept
LOOK_S = 10.0


def log_into(file: Path, most_bytes: int = LOG_BYTES) -> None:
    """Appends standard output and standard error to `file`; if it is too long, it becomes `file`.1 first."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if file.exists() and file.stat().st_size > most_bytes:
        file.replace(file.with_name(f"{file.name}.1"))
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)


def keep_bounded(file: Path, most_bytes: int = LOG_BYTES, look_s: float = LOOK_S) -> None:
    """Looks at the log's size from time to time, in a thread that ends with the process."""

    def look() -> None:
        while True:
            time.sleep(look_s)
            try:
                if os.fstat(2).st_size > most_bytes:
                    log_into(file, most_bytes)
            except OSError:  # a full disk, or a folder that was removed: the next look tries again
                continue

    threading.Thread(target=look, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mlx_flash.service.start")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--key", type=Path)
    end = sys.argv.index("--")
    own, flags = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    if own.log is not None:
        log_into(own.log)
        keep_bounded(own.log)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"-- {now} mlx_flash {__version__}, process {os.getpid()} --", file=sys.stderr, flush=True)
    if own.key is not None:
        try:
            os.environ[KEY_VARIABLE] = own.key.read_text().strip()
        except OSError as error:  # never without the key: that would open the server to others
            sys.exit(f"the file with the API key, {own.key}, cannot be read: {error.strerror}. Install again.")
    sys.argv[1:] = flags
    runpy.run_module("mlx_flash.server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
