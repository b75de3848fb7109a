"""Runs `mlxflash chat` with a model that says what a test has written: `scripted_chat.py ANSWERS.json FLAGS`.

ANSWERS.json: a list of [text, answer]. The answer of the first text that the last question contains is said, and PROMPT
in it is replaced by the beginning and the end of the prompt, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from scripted import Scripted  # type: ignore[import-not-found]  # found beside this file

from mlx_flash import chat
from mlx_flash.cli.run import run_command

OTHERWISE = "I see."


def main() -> None:
    answers = json.loads(Path(sys.argv.pop(1)).read_text())

    def script(prompt: str) -> str:
        asked = prompt.rpartition("<|im_start|>user")[2]
        answer = next((answer for text, answer in answers if text in asked), OTHERWISE)
        return str(answer).replace("PROMPT", json.dumps(f"{prompt[:40]} ... {prompt[-110:]}"))

    with pytest.MonkeyPatch.context() as patch:
        Scripted(Path(), patch).script = script
        run_command(chat.make_parser(), chat.main)


if __name__ == "__main__":
    main()
