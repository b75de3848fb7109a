"""The console script finds a command, starts it like `python -m`, and is quick about it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mlx_flash
from mlx_flash.cli.main import COMMANDS

HEAVY = {"mlx", "mlx_lm", "numpy", "transformers", "huggingface_hub", "tokenizers", "psutil", "torch", "toga", "rich"}
ROOT = Path(__file__).parent.parent


def mlxflash(*arguments: str, first: str = "") -> subprocess.CompletedProcess[str]:
    code = f"{first}\nfrom mlx_flash.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=600)


def test_it_is_the_one_script_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"mlxflash": "mlx_flash.cli.main:main"}
    assert mlx_flash.__version__ == project["version"]


def test_help_lists_every_command() -> None:
    for option in ("--help", "-h"):
        done = mlxflash(option)
        assert done.returncode == 0 and done.stderr == ""
        listed = re.findall(r"^  (\w+) +\w.*$", done.stdout, re.MULTILINE)
        assert (
            listed
            == list(COMMANDS)
            == [
                *(
                    "generate",
                    "chat",
                    "server",
                    "service",
                    "launch",
                    "plan",
                    "download",
                    "convert",
                    "check",
                    "report",
                    "cache",
                    "doctor",
                    "bench",
                    "app",
                )
            ]
        )


def test_version() -> None:
    done = mlxflash("--version")
    assert (done.returncode, done.stdout) == (0, f"mlxflash {mlx_flash.__version__}\n")


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("--nonsense",), ("",), ("Generate",)])
def test_an_unknown_command_ends_with_2_and_a_sentence(arguments: tuple[str, ...]) -> None:
    done = mlxflash(*arguments)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert all(part in done.stderr for part in [*COMMANDS, *arguments, "mlxflash --help"])


@pytest.mark.parametrize("name", ["generate", "chat", "convert", "check", "cache", "doctor", "report", "bench"])
def test_a_command_is_called_as_it_was_started(name: str) -> None:
    by_script = mlxflash(name, "--help")
    by_module = subprocess.run(
        [sys.executable, "-m", COMMANDS[name][0], "--help"], capture_output=True, text=True, timeout=60
    )
    assert by_script.returncode == by_module.returncode == 0
    assert by_script.stdout.startswith(f"usage: mlxflash {name} ")
    assert by_module.stdout.startswith(f"usage: python -m mlx_flash.{name} ")

    def words(text: str) -> list[str]:
        return text.split("\n\n", 1)[1].split()

    assert words(by_script.stdout) == words(by_module.stdout)


def test_exit_codes_are_the_commands_own(tmp_path: Path) -> None:
    assert mlxflash("check", str(tmp_path)).returncode == 1
    wrong = mlxflash("generate", "--max-tokens", "0")
    assert (wrong.returncode, wrong.stderr) == (2, "mlxflash generate: --max-tokens is 0, expected at least 1.\n")


def test_nothing_heavy_is_imported_before_a_command_is_found() -> None:
    for arguments in (
        ["--help"],
        ["--version"],
        ["nonsense"],
        ["generate", "--help"],
        ["doctor", "--help"],
        ["report", "--help"],
        ["plan", "--help"],
    ):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "mlx_flash.cli.main", *arguments],
            capture_output=True,
            text=True,
            timeout=600,
        )
        modules = re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE)
        assert "mlx_flash" in modules
        assert {name.split(".")[0] for name in modules} & HEAVY == set(), arguments


def test_what_is_not_installed_is_named() -> None:
    done = mlxflash("app", first="import sys; sys.modules['toga'] = None")
    assert (done.returncode, done.stdout) == (1, "")
    assert 'it needs the package toga: pip install "mlx-flash-runtime[app]"' in done.stderr
    done = mlxflash("check", first="import mlx_flash.cli.main as c; c.COMMANDS['check'] = ('mlx_flash.no.such', '')")
    assert done.returncode == 1 and "this installation lacks mlx_flash.no.such" in done.stderr


def test_every_command_that_is_here_can_be_started() -> None:
    for name, (module, _) in COMMANDS.items():
        folder = {"app": ROOT / "apps" / "menubar", "server": ROOT / "mlx_flash" / "server"}.get(name)
        if folder is None or folder.is_dir():
            assert importlib.util.find_spec(module) is not None, name


def test_the_page_of_flags_is_that_of_the_parsers() -> None:
    """If this fails, run `python tests/flag_tables.py`."""
    import flag_tables  # type: ignore[import-not-found]  # found beside this file

    assert flag_tables.PAGE.read_text(encoding="utf-8") == flag_tables.page()
    assert not [line for line in flag_tables.page().splitlines() if line.startswith("| `") and line.count("|") != 3]
    assert {*flag_tables.MODULES} == {*COMMANDS} - {"bench", "app"}
