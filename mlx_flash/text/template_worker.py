"""The process that renders chat templates. `template_process` runs it; it imports nothing else from this package.

A chat template is a program that came with the model, so it runs in a process that can be limited and killed. Standard
input has one request per line, standard output one answer per line, both in JSON. The process ends when its input does.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import types
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

RENDERER = "transformers.utils.chat_template_utils"
MEMORY_PER_BYTE = 64  # memory per byte of a request: its JSON as Python objects, and a copy of them
MOST_SAID = 300  # maximum characters of an error


def main(seconds: float, memory_bytes: int) -> None:
    """Answers requests. Each may take `seconds`, and `memory_bytes` of memory beyond its request's own."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # SIGALRM ends the process, even inside a C function.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    render = load_renderer()
    _answer({})
    for line in sys.stdin.buffer:
        limit_memory(memory_bytes + MEMORY_PER_BYTE * len(line))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        answer = answer_to(line, render)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _answer(answer)


def load_renderer() -> Callable[..., tuple[list[str], Any]]:
    """transformers' `render_jinja_template`, so that prompts are the same as those of transformers.

    `import transformers` takes seconds and 60 MB. The file with this function needs almost none of it, so it is
    imported with stand-ins for its own imports. If a later version needs more, the whole package is imported.
    """
    spec = find_spec("transformers")
    if spec is not None and spec.submodule_search_locations:
        folder = next(iter(spec.submodule_search_locations))
        logging = _module("transformers.utils.logging", get_logger=lambda _name: None)
        stand_ins = {
            "transformers": _module("transformers", __path__=[folder]),
            "transformers.utils": _module(
                "transformers.utils", __path__=[os.path.join(folder, "utils")], logging=logging
            ),
            "transformers.utils.logging": logging,
            "transformers.utils.import_utils": _module(
                "transformers.utils.import_utils",
                is_jinja_available=lambda: True,
                is_torch_available=lambda: False,
                is_vision_available=lambda: False,
            ),
            "numpy": _module("numpy", generic=()),  # `isinstance(value, numpy.generic)` is false for values from JSON.
        }
        sys.modules.update(stand_ins)
        try:
            return import_module(RENDERER).render_jinja_template  # type: ignore[no-any-return]
        except Exception:
            for name in (*stand_ins, RENDERER):
                sys.modules.pop(name, None)
    return import_module(RENDERER).render_jinja_template  # type: ignore[no-any-return]


def _module(name: str, **contents: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    return module


def answer_to(line: bytes, render: Callable[..., tuple[list[str], Any]]) -> dict[str, Any]:
    """The answer to a request: {"text"}, or else one of three errors.

    {"refused"}: the template raised an error on purpose. {"failed"}: another error. {"limit"}: a limit was exceeded.

    line: JSON of {"characters": maximum length of the text, "arguments": of `render`}.
    """
    try:
        request = json.loads(line)
        (text,), _ = render(**request["arguments"])
        if len(text) > request["characters"]:
            return {"limit": f"makes a text of more than {request['characters']} characters"}
        return {"text": text}
    except MemoryError:
        return {"limit": "needs more memory than its limit"}
    except Exception as error:
        said = " ".join(str(error)[: 2 * MOST_SAID].split())[:MOST_SAID].rstrip(".")
        # The text is shown in a terminal.
        said = "".join(character if character.isprintable() else "?" for character in said)
        if type(error).__name__ == "TemplateError":
            return {"refused": said}
        return {"failed": f"{type(error).__name__}: {said}"}


def limit_memory(more_bytes: int) -> None:
    """Limits memory to `more_bytes` beyond what the process has now. Linux only: macOS does not enforce this limit."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            wanted = int(file.read().split()[0]) * resource.getpagesize() + more_bytes
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
