"""`mlxflash service`: the definitions for launchd and systemd, and the flags in them."""

from __future__ import annotations

import configparser
import os
import plistlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from services import HOSTILE, PLACES, defined, fresh_home  # type: ignore[import-not-found]  # found beside this file

from mlx_flash.cli.flag_words import flags_of
from mlx_flash.defaults import KEY_VARIABLE
from mlx_flash.errors import FlashError, UsageError
from mlx_flash.service import installing
from mlx_flash.service.__main__ import main, make_parser, make_server_parser, manager_here
from mlx_flash.service.definition import ServiceFiles, environment_of, flags_in, lasting_python, places
from mlx_flash.service.launchd_agent import LABEL, Launchd
from mlx_flash.service.systemd_unit import UNIT, Systemd, quoted, unquoted


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return Path(fresh_home(tmp_path, monkeypatch))


# -- the files -------------------------------------------------------------------------------------------------


def test_the_agent_is_what_launchd_reads() -> None:
    made = defined(*(f"--name={text}" for text in HOSTILE), key=True)
    agent = plistlib.loads(Launchd().text(made))
    command = agent.pop("ProgramArguments")
    assert command == made.command() == Launchd().command_in(Launchd().text(made))
    assert command[:5] == [
        sys.executable,
        "-m",
        "mlx_flash.service.start",
        f"--log={PLACES.log}",
        f"--key={PLACES.key}",
    ]
    assert flags_in(command) == [f"--name={text}" for text in HOSTILE]
    assert agent == {
        "Label": LABEL,
        "EnvironmentVariables": made.environment,
        "WorkingDirectory": str(Path.home()),
        "RunAtLoad": True,
        "KeepAlive": {"Crashed": True},
        "ThrottleInterval": 60,
        "ExitTimeOut": 20,
        "ProcessType": "Interactive",
        "SoftResourceLimits": {"NumberOfFiles": 4096, "Core": 0},
        "HardResourceLimits": {"NumberOfFiles": 4096, "Core": 0},
        "Umask": 0o077,
    }


def test_the_unit_is_what_systemd_reads() -> None:
    made = defined(*(f"--name={text}" for text in HOSTILE))
    text = Systemd().text(made)
    assert Systemd().command_in(text) == made.command()
    unit = configparser.RawConfigParser(strict=False)  # Environment stands there more than once
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(text.decode())
    service = dict(unit["Service"])
    assert service.pop("ExecStart").startswith(f'"{sys.executable}" "-m" "mlx_flash.service.start" ')
    assert service == {
        "Type": "exec",
        "Environment": '"PYTHONSAFEPATH=1"',
        "WorkingDirectory": "~",
        "Restart": "on-abnormal",
        "RestartSec": "10",
        "TimeoutStopSec": "20",
        "Nice": "5",
        "LimitNOFILE": "4096",
        "LimitCORE": "0",
        "UMask": "0077",
        "NoNewPrivileges": "yes",
    }
    assert 'Environment="HF_HOME=/a %%h \\"b\\" $c"' in text.decode()
    assert dict(unit["Install"]) == {"WantedBy": "default.target"}
    assert unit["Unit"]["StartLimitBurst"] == "5"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"])).map(lambda text: text + "\n\t"), min_size=1))
def test_words_of_a_unit_come_back(words: list[str]) -> None:
    line = " ".join(map(quoted, words))
    assert "\n" not in line and unquoted(line) == words


def test_a_unit_quotes_what_systemd_would_replace() -> None:
    assert quoted('a "b" \\ %h $HOME\n') == '"a \\"b\\" \\\\ %%h $$HOME\\n"'
    assert quoted("$HOME", "$") == '"$HOME"'  # the program itself, where systemd replaces no variables


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / UNIT
    unit.write_bytes(Systemd().text(defined(*(f"--name={text}" for text in HOSTILE))))
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", str(unit)],
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert UNIT not in done.stderr and done.returncode == 0, done.stderr


@pytest.mark.parametrize("python", ["/a'b/python", '/a"b/python', "/a\\b/python"])
def test_a_program_that_systemd_would_not_start_is_refused(python: str) -> None:
    with pytest.raises(UsageError, match="systemd starts no such program"):
        Systemd().text(defined(python=python))


@pytest.mark.parametrize("text", ["a\rb", "\x1b[31m", "half \ud800", "\x00", "\x7f"])
def test_a_character_that_a_file_cannot_hold_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="cannot hold"):
        defined(f"--name={text}").check()
    defined("--name=two\nlines\t").check()


@pytest.mark.parametrize(
    "contents", [b"", b"<plist>", b"[Unit]\nA=1\n", plistlib.dumps({"Label": "x"}), b"\xff\xfe", b'ExecStart="\\x20"\n']
)
def test_a_foreign_definition_is_told_apart(contents: bytes) -> None:
    for manager in (Launchd(), Systemd()):
        with pytest.raises(ValueError):
            flags_in(manager.command_in(contents))
    with pytest.raises(ValueError, match="does not start"):
        flags_in(["/bin/sleep", "--", "1"])


def test_places(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert places() == ServiceFiles(home / ".local/state/mlx_flash/server.log", home / ".config/mlx_flash/service-key")
    assert isinstance(manager_here(), Systemd)
    assert Systemd().file == home / ".config/systemd/user" / UNIT
    monkeypatch.setattr(sys, "platform", "darwin")
    assert places().log == home / "Library/Logs/mlx_flash/server.log"
    assert isinstance(manager_here(), Launchd)
    assert Launchd().file == home / f"Library/LaunchAgents/{LABEL}.plist"


# -- the server's flags, and the interpreter ---------------------------------------------------------------------


def test_flags_keep_their_meaning_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    words = ["--model", "model", "--mem", "6GB", "--port", "8080", "--idle-unload=15m", "--verify", "--api-key", "s"]
    words += ["--name", "a", "--name=--b", "--chat-template-args", '{"x":\n 1}', "--draft-model", "OWNER/NAME"]
    made = flags_of(words, make_server_parser)
    assert set(made) == {
        f"--model={tmp_path / 'model'}",
        "--memory=6GB",
        "--port=8080",
        "--idle-unload=15m",
        "--verify",
        "--name=a",
        "--name=--b",
        '--chat-template-args={"x":\n 1}',
        "--draft-model=OWNER/NAME",
    }
    before, after = (vars(make_server_parser().parse_args(given)) for given in (words, made))
    assert {name for name in before if before[name] != after[name]} == {"api_key", "model"}


def test_every_flag_of_the_server_is_passed_on() -> None:
    for action in make_server_parser()._actions:
        if action.dest in ("help", "print", "api_key"):
            continue
        for value in [None] if action.nargs == 0 else (action.choices or ["7"]):
            word = action.option_strings[0] if value is None else f"{action.option_strings[0]}={value}"
            default = value is not None and str(value) == action.default
            assert flags_of([word], make_server_parser) == (() if default else (word,))


def test_variables_that_say_where_models_are_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shell = {"HF_HOME": "hub", "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": "", "HF_TOKEN": "secret", "PATH": "/bin"}
    assert environment_of(shell) == {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}


def test_the_interpreter_outlasts_an_upgrade(tmp_path: Path) -> None:
    real = tmp_path / "Cellar/mlxflash/0.1.0/libexec/bin/python"
    real.parent.mkdir(parents=True)
    real.touch()
    assert lasting_python(str(real)) == str(real)  # without Homebrew's link
    (tmp_path / "opt").mkdir()
    (tmp_path / "opt/mlxflash").symlink_to(tmp_path / "Cellar/mlxflash/0.1.0")
    assert lasting_python(str(real)) == str(tmp_path / "opt/mlxflash/libexec/bin/python")
    environment = tmp_path / "venv-python"  # as in an environment: a link that must not be followed
    environment.symlink_to(sys.executable)
    assert lasting_python(str(environment)) == str(environment)
    for lacking in ("", str(tmp_path / "none")):
        with pytest.raises(FlashError, match="does not know its own path"):
            lasting_python(lacking)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "0"], "needs a port"),
        (["--exit-with-stdin"], "no standard input"),
        (["--memory", "lots"], "memory"),
        (["--host", "0.0.0.0"], "an API key is required"),
        (["--host", "no.such.host.invalid"], "not an address"),
        (["--allow-origin", "x"], "--allow-origin"),
        (["--name", "\x1b"], "--name"),
        (["--disk-cache", "x"], "disk_cache"),
    ],
)
def test_values_that_no_service_can_have_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        installing.defined(make_server_parser().parse_args(words), words, make_server_parser, PLACES)


def test_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = make_parser().parse_args(["install", "--memory", "6GB", "--print", "--name", "status"])
    assert parsed.print and parsed.server.memory == "6GB" and parsed.server.name == ["status"]
    assert flags_of(parsed.words, make_server_parser) == ("--memory=6GB", "--name=status")
    parsed = make_parser().parse_args(["install", "--model", "install", "--pri"])
    assert parsed.print and flags_of(parsed.words, make_server_parser) == ("--model=install",)
    assert flags_of(["--model", "~nobody-has-this-name/x"], make_server_parser) == ("--model=~nobody-has-this-name/x",)
    for words in (["install", "--nonsense"], ["install", "--port", "x"], ["status", "--port", "1"], [], ["start"]):
        with pytest.raises(SystemExit) as ended:
            make_parser().parse_args(words)
        assert ended.value.code == 2
    capsys.readouterr()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv(KEY_VARIABLE, "a secret")
    assert main(make_parser().parse_args(["install", "--print", "--port", "9"])) == 0
    shown = capsys.readouterr().out
    assert flags_in(plistlib.loads(shown.encode())["ProgramArguments"]) == ["--port=9"] and "a secret" not in shown
