"""python -m mlx_flash.rank: a rank other than 0. Rank 0 starts it and writes what it must know to standard input."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from .errors import FlashError


def main(setup: dict[str, Any]) -> None:
    from .ranks.follower import Follower
    from .ranks.group import Handlers, follow

    handlers = Handlers()
    group = Follower(setup, handlers)  # first, so that rank 0 knows a rank that hangs from one that imports for seconds
    from .loading.other_rank import register

    register(group, handlers, group.model, group.memory)
    follow(group, handlers)


if __name__ == "__main__":
    os.dup2(2, 1)  # Rank 0 shows what comes on standard error.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Rank 0 decides when this process ends.
    try:
        main(json.loads(sys.stdin.readline()))
    except FlashError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    except Exception as error:
        print(f"unexpected error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)  # Threads may still wait for a disk.
