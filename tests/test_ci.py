"""The checks that continuous integration runs beside the suite."""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from children_setup import FOR_CHILDREN  # type: ignore[import-not-found]  # found beside this file

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
        "import sys; before = [one for one in sys.meta_path if type(one).__name__ == 'Afterwards']\n"
        "assert before and 'mlx' not in sys.modules\n"
        "import mlx.core as mx, mlx.nn\n"
        "print(mx.default_device(), [one for one in sys.meta_path if type(one).__name__ == 'Afterwards'])"
    )
    environment = {**os.environ, "PYTHONPATH": FOR_CHILDREN, "MLX_FLASH_TEST_DEVICE": "cpu"}
    del environment["MLX_FLASH_TEST_IMPORTS"]
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "Device(cpu, 0) []\n", done.stderr


def test_processes_take_the_list_of_transformers_modules_as_it_is_and_collect_garbage_as_usual() -> None:
    program = (
        "import gc, pickle, sys, mlx_lm, transformers.models; from transformers.utils import import_utils\n"
        "define, file = import_utils.define_import_structure, transformers.models.__file__\n"
        "sys.stdout.buffer.write(pickle.dumps([define(file), define(file, 'models'), gc.get_threshold()]))"
    )
    found = []
    for path in (FOR_CHILDREN, ""):
        environment = {**os.environ, "PYTHONPATH": path}
        found.append(subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True).stdout)
    assert found[0] and pickle.loads(found[0]) == pickle.loads(found[1])


def test_the_list_of_defects_names_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)", (ROOT / "docs" / "defects.md").read_text())
    assert len(named) > 80
    assert [pair for pair in named if f"def {pair[1]}(" not in (ROOT / pair[0]).read_text()] == []
