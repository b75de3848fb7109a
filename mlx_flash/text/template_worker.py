"""A process that renders chat templates. `template_process` runs it; it imports nothing else of this package.

A chat template is a program that came with the model, so it runs in a process that can be limited and killed. Standard
input has one request per line, standard output one answer per line, both JSON. The process ends with its input.
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
MEMORY_PER_BYTE = 64  # of a request: what its JSON may take as Python objects, and once more as a copy
MOST_SAID = 300  # characters of an error


def main(seconds: float, memory_bytes: int) -> None:
    """Each rendering may take `seconds`, and `memory_bytes` beyond what its request takes."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # it ends the process, also in the middle of a C function
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
    """transformers' `render_jinja_template`, so that a prompt is what transformers makes of the template.

    `import transformers` takes seconds and 60 MB. The one file that renders needs almost none of it, so that file is
    imported with stand-ins for what it imports; if it comes to need more, the whole package is imported.
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
            "numpy": _module("numpy", generic=()),  # `isinstance(value, numpy.generic)` is false for what JSON has
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
    """{"text"}, {"refused"} for what the template raises on purpose, {"failed"} for other errors, {"limit"} for a size.

    line: JSON of {"characters": the most that the text may have, "arguments": of `render`}.
    """
    try:
        request = json.loads(line)
        (text,), _ = render(**request["arguments"])
        if len(text) > request["characters"]:
            return {"limit": f"makes a text of more than {request['characters']} characters"}
        return {"text": text}
    except MemoryError:
        return {"limit": "takes more memory than it may"}
    except Exception as error:
        said = " ".join(str(error)[: 2 * MOST_SAID].split())[:MOST_SAID].rstrip(".")
        said = "".join(character if character.isprintable() else "?" for character in said)  # it goes to a terminal
        if type(error).__name__ == "TemplateError":
            return {"refused": said}
        return {"failed": f"{type(error).__name__}: {said}"}


def limit_memory(more_bytes: int) -> None:
    """To so much beyond what the process has now. Linux only: macOS does not enforce this limit."""
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
