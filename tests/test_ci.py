"""What continuous integration runs beside the suite."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("newer_versions", ROOT / ".ci" / "newer_versions.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_newer_versions_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script()
    pins = script.tested(ROOT / "pyproject.toml")
    assert set(pins) == set(script.WATCHED)
    monkeypatch.setattr(script, "newest", lambda package: pins[package] + ".0")
    assert script.main() == 0
    monkeypatch.setattr(script, "newest", lambda package: pins[package] + (".1" if package == "mlx" else ""))
    assert script.main() == 1
    assert script.numbers("0.33") > script.numbers("0.32.10") > script.numbers("0.32.9")


def test_processes_compute_on_the_cpu_where_the_suite_does() -> None:
    program = (
        "import sys; before = [one for one in sys.meta_path if type(one).__name__ == 'OnCpu']\n"
        "assert before and 'mlx' not in sys.modules\n"
        "import mlx.core as mx, mlx.nn\n"
        "print(mx.default_device(), [one for one in sys.meta_path if type(one).__name__ == 'OnCpu'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).with_name("on_cpu"))}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "Device(cpu, 0) []\n", done.stderr
