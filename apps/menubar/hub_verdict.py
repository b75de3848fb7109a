"""Says whether and how a repository would run: python -m mlx_flash.apps.menubar.hub_verdict OWNER/NAME

A separate process, because a plan imports MLX and a zoo. It prints two lines of JSON: the size of the download, and the
verdict. No weights are downloaded.
"""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

from .budgets import rounded_up


def verdict_on(repository: str) -> dict[str, Any]:
    """{"converts", "smallest", "everything"}: whether it must be converted first, else two budgets in bytes.

    Prints the size of the download as soon as it is known. Raises FlashError for a model that does not run.
    """
    import mlx_flash.server.app
    import mlx_flash.server.serving  # noqa: F401  # The plan counts this process, which must be as large as the server.
    from mlx_flash.loading.hub_plan import plan_before_download
    from mlx_flash.loading.options import LoadOptions
    from mlx_flash.loading.plan import ENDLESS

    made = plan_before_download(
        repository, LoadOptions(memory=ENDLESS), lambda listing: print(json.dumps(listing.as_dict()), flush=True)
    )
    if made is None:
        return {"converts": True, "smallest": None, "everything": None}
    return {"converts": False, "smallest": rounded_up(made.smallest), "everything": rounded_up(made.everything)}


def main() -> None:
    from mlx_flash.cli import stopping
    from mlx_flash.errors import FlashError

    stopping.end_with_stdin()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(json.dumps(verdict_on(sys.argv[1])))
    except FlashError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:  # The folder of headers is removed by now.
        sys.exit(143)


if __name__ == "__main__":
    main()
