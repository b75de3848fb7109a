"""The process that plans the models on this machine. `library` runs it: planning imports what a model's class needs.

The first line of standard input is a request in JSON: {"options": fields of LoadOptions, "models": values of --model}.
Standard output gets one line per model, in that order. The process ends when its input does.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

NICENESS = 10  # The server's own work comes first.


def main() -> None:
    os.nice(NICENESS)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Whatever a library prints must not stand between the answers.
    line = sys.stdin.buffer.readline()
    from ..cli.stopping import end_with_stdin

    end_with_stdin()
    request = json.loads(line)
    for model in request["models"]:
        answer = planned(model, request["options"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def planned(model: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """What a model needs: {"smallest", "everything", "images", "reason"}, in bytes without the process.

    reason: why it cannot run, else empty.
    """
    from ..errors import FlashError
    from ..loading.load import plan
    from ..loading.options import LoadOptions
    from ..loading.plan import ENDLESS
    from ..source.failures import foreseen

    found: dict[str, Any] = {"smallest": None, "everything": None, "images": None, "reason": ""}
    try:
        found["images"] = reads_images(model)
        images = bool(options.get("images")) and found["images"]
        made = plan(model, LoadOptions(**{**options, "images": images, "memory": ENDLESS}))
        found["smallest"] = made.smallest - made.demand.process
        found["everything"] = made.everything - made.demand.process
    except FlashError as error:
        found["reason"] = str(error)
    except Exception as error:  # whatever a damaged checkpoint makes a library raise
        found["reason"] = foreseen(error) or f"it cannot be planned: {type(error).__name__}: {error}"[:300]
    return found


def reads_images(model: str | None) -> bool:
    """Whether `--images` would make the model read images."""
    from ..flash.files import is_store
    from ..loading.config import read_config
    from ..source.resolve import resolve_source
    from ..source.zoos import has_vision, mlx_vlm_module

    folder = resolve_source(model, None, lambda _: None, fetch=False)
    if is_store(folder):
        return False
    config = read_config(folder)
    return has_vision(config) and mlx_vlm_module(config) is not None


if __name__ == "__main__":
    main()
