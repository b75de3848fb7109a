"""Keeps transformers from running code out of a checkpoint's folder, whatever a zoo asks it for.

Several processors of mlx-vlm pass `trust_remote_code=True` to transformers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from typing import Any

from ..errors import UnsupportedModelError

# Modules of transformers that decide whether such code is trusted. Each has a name of its own for the function.
DECIDING = (
    "dynamic_module_utils",
    *(f"models.auto.{name}_auto" for name in ("configuration", "feature_extraction", "image_processing")),
    *(f"models.auto.{name}_auto" for name in ("processing", "tokenization", "video_processing")),
)
DECISION, RUNNING = "resolve_trust_remote_code", "get_class_in_module"

_refusing: ContextVar[bool] = ContextVar("refusing", default=False)
_installing = threading.Lock()
_installed = False


@contextmanager
def refusing_remote_code() -> Iterator[None]:
    """Inside this context, transformers trusts no code of a checkpoint. Its own class is used where it has one.

    Raises UnsupportedModelError where only such code would do. Other threads, and what runs outside the context, are
    not affected.
    """
    _install()
    token = _refusing.set(True)
    try:
        yield
    finally:
        _refusing.reset(token)


def _install() -> None:
    """Puts the checks in front of transformers' functions, once per process."""
    global _installed
    with _installing:
        if _installed:
            return
        utils = import_module(f"transformers.{DECIDING[0]}")
        decide, run = getattr(utils, DECISION), getattr(utils, RUNNING)

        def decided(trust_remote_code: Any, model_name: Any, *rest: Any, **options: Any) -> Any:
            if not _refusing.get():
                return decide(trust_remote_code, model_name, *rest, **options)
            try:
                return decide(False, model_name, *rest, **options)
            except ValueError:
                raise _needs_code(model_name) from None

        def not_run(class_name: str, module_path: Any, **options: Any) -> Any:
            if _refusing.get():
                raise _needs_code(f"{module_path} ({class_name})")
            return run(class_name, module_path, **options)

        for name in DECIDING:
            setattr(import_module(f"transformers.{name}"), DECISION, decided)
        setattr(utils, RUNNING, not_run)
        _installed = True


def _needs_code(where: object) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where} needs code out of the checkpoint, and code from a checkpoint is never run. Use a checkpoint of a "
        "type whose classes are in transformers or in mlx-vlm."
    )
