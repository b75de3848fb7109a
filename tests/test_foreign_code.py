"""Code in a checkpoint's folder is never run, whatever command is started there."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Tiny  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.apps.menubar.budgets import planned_budgets
from mlx_flash.apps.menubar.server_process import EngineProcess, server_command
from mlx_flash.bench.tools.subprocess_json import ask
from mlx_flash.errors import CheckpointError, FlashError
from mlx_flash.loading.load import load
from mlx_flash.source.children import child_environment
from mlx_flash.text.tokenizer import load_tokenizer

ROOT = Path(mlx_flash.__file__).parent

# Modules that this package and its libraries import, from Python's library and others. Each reports when it is run.
NAMES = (
    *("tqdm", "numpy", "json", "argparse", "psutil", "filelock", "transformers", "mlx_lm", "huggingface_hub", "regex"),
    *("subprocess", "ctypes", "signal", "sitecustomize", "usercustomize", "sentencepiece", "tiktoken", "uvicorn"),
    *("model", "modeling_x", "tokenization_x", "configuration_x"),
)  # fmt: skip


@pytest.fixture
def hostile(tiny: Tiny, tmp_path: Path) -> Path:
    """A checkpoint with these modules, which write their names to RUN beside it, and a config that refers to them."""
    folder = Path(shutil.copytree(tiny.checkpoint, tmp_path / "hostile"))
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'RUN')!r}, 'a').write({name!r} + '\\n')\n")
    return folder


def run_there(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=600
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def run_by(folder: Path) -> str:
    run = folder.parent / "RUN"
    return run.read_text() if run.exists() else ""


def test_commands_started_in_a_checkpoint_s_folder(hostile: Path, tmp_path: Path) -> None:
    """Covers the command itself and the conversion that it starts."""
    cache = str(tmp_path / "cache")
    program = [sys.executable, "-m", "mlx_flash.generate", "--model", ".", "--max-tokens", "1", "--prompt", "so"]
    done = run_there(hostile, *program, MLX_FLASH_CACHE=cache)
    assert done.returncode == 0 and "converting" in done.stderr, done.stderr
    script = Path(sys.executable).with_name("mlxflash")
    assert run_there(hostile, str(script), "check", ".").returncode == 1
    assert run_by(hostile) == ""


def test_children_of_the_app_and_of_measurements(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hostile)
    planned_budgets(".")
    engine = EngineProcess([*server_command(None, None), "--help"])
    engine.watch(lambda _: None, lambda _: None, lambda _: None)
    engine.stop()
    with contextlib.suppress(FlashError):
        ask("mlx_flash.check", ["--help"], "nothing")
    assert run_by(hostile) == ""


def test_every_child_python_is_given_that_environment() -> None:
    """Every process is started with `child_environment`, unless it is not a Python process."""
    others = {
        "bench/tools/report.py": 2,
        "bench/tools/read_methods.py": 1,
        "apps/menubar/native.py": 1,
        "bench/tools/namespaces.py": 3,
        "bench/tools/preload.py": 1,
        "mlx_flash/machine/hardware.py": 1,
        "mlx_flash/machine/volumes.py": 1,
        "mlx_flash/service/system_manager.py": 1,
        "mlx_flash/service/installing.py": 1,
    }  # git, fio, pbcopy, ip, unshare, C compilers, system_profiler, diskutil, systemctl; a Python in /, as service
    found: dict[str, int] = {}
    top = ROOT.parent
    for file in sorted({*ROOT.rglob("*.py"), *(top / "bench").rglob("*.py"), *(top / "apps").rglob("*.py")}):
        name = str(file.resolve().relative_to(top.resolve()))
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("subprocess.Popen", "subprocess.run"):
                given = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "env"]
                if not any("child_environment" in text or text == "environment" for text in given):
                    found[name] = found.get(name, 0) + 1
    assert found == others


def test_a_clone_that_is_not_installed_is_still_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.chdir(ROOT.parent)
    assert "PYTHONSAFEPATH" not in child_environment()
    monkeypatch.chdir(tmp_path)
    assert child_environment(A="b").items() >= {"PYTHONSAFEPATH": "1", "A": "b"}.items()


@pytest.mark.parametrize(
    "settings",
    [
        {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "tokenizer_class": "X"},
        {"auto_map": {"AutoTokenizer": ["tokenization_x.X", "tokenization_x.X"]}, "tokenizer_class": "X"},
        {"chat_template_type": "../../tokenization_x"},
        {"tool_parser_type": "..tokenization_x"},
        {"chat_template_type": "tokenization_x"},
    ],
)
def test_no_setting_of_a_tokenizer_runs_code(hostile: Path, monkeypatch: pytest.MonkeyPatch, settings: object) -> None:
    """transformers would ask on the terminal, and mlx-lm would import the modules that these name."""
    monkeypatch.chdir(hostile)
    path = hostile / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))  # type: ignore[dict-item]
    config = hostile / "config.json"
    auto = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": auto}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with contextlib.suppress(CheckpointError):
        load_tokenizer(hostile)
    assert run_by(hostile) == ""


def test_a_config_that_names_code_is_refused(hostile: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(hostile)
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    config = hostile / "config.json"
    for more in ({"model_file": "model.py"}, {"model_type": "..model", "num_experts": 2}, {"model_type": "/model"}):
        config.write_text(json.dumps({**json.loads(config.read_text()), **more}))
        with pytest.raises(FlashError):
            load(hostile)
    assert run_by(hostile) == ""
