"""Builds the libraries that are preloaded into child processes, and small programs. Needs a C compiler and Linux."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path


def library_of(source: Path) -> Path:
    """The compiled library of a C file, built once per version of the file."""
    return _built(source, ".so", ("-shared", "-fPIC"))


def program_of(source: Path) -> Path:
    """The compiled program of a C file, built once per version of the file."""
    return _built(source, ".program", ())


@functools.cache
def _built(source: Path, suffix: str, options: tuple[str, ...]) -> Path:
    version = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    target = Path(tempfile.gettempdir()) / f"{source.stem}-{os.getuid()}-{version}{suffix}"
    if not target.exists():
        made = target.with_suffix(f".{os.getpid()}")
        subprocess.run(["cc", *options, "-O1", "-o", str(made), str(source), "-ldl", "-lpthread"], check=True)
        made.replace(target)
    return target


def preload_with(library: Path) -> str:
    """The value of LD_PRELOAD with one more library, which goes first."""
    before = os.environ.get("LD_PRELOAD", "")
    return f"{library}:{before}" if before else str(library)
