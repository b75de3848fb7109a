"""`mlxflash service`: what is done with launchd and systemd, both scripted, and what they start."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from services import defined, fresh_home  # type: ignore[import-not-found]  # found beside this file

from mlx_flash.defaults import KEY_VARIABLE
from mlx_flash.errors import BudgetError, FlashError
from mlx_flash.service import installing, launchd_agent, service_status, system_manager, systemd_unit
from mlx_flash.service.__main__ import make_server_parser
from mlx_flash.service.definition import Definition, ServiceFiles
from mlx_flash.service.launchd_agent import LABEL, Launchd
from mlx_flash.service.start import log_into
from mlx_flash.service.system_manager import ServiceState, SystemManager, ran, why
from mlx_flash.service.systemd_unit import UNIT, Systemd


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return Path(fresh_home(tmp_path, monkeypatch))


# -- launchd and systemd -----------------------------------------------------------------------------------------


class Commands:
    """Answers commands of the system. answers: the first words after the program -> (exit code, output) by turns."""

    def __init__(self, **answers: list[tuple[int, str]]) -> None:
        self.answers, self.calls = answers, list[str]()

    def __call__(self, *command: str) -> subprocess.CompletedProcess[str]:
        self.calls.append(" ".join(command))
        name = next(word for word in command[1:] if word != "--user").replace("-", "_")
        turns = self.answers.get(name, [(0, "")])
        code, text = turns.pop(0) if len(turns) > 1 else turns[0]
        return subprocess.CompletedProcess(command, code, text if code == 0 else "", text if code else "")


def launchd(monkeypatch: pytest.MonkeyPatch, **answers: list[tuple[int, str]]) -> tuple[Launchd, Commands]:
    commands = Commands(**answers)
    monkeypatch.setattr(launchd_agent, "ran", commands)
    monkeypatch.setattr(launchd_agent, "time", SimpleNamespace(monotonic=iter(range(10**6)).__next__, sleep=int))
    return Launchd(), commands


GONE = (113, "Could not find service")


def test_launchd_starts_an_agent_after_the_old_one_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, commands = launchd(monkeypatch, print=[(0, ""), (0, ""), (0, ""), GONE], bootout=[(36, "in progress")])
    manager.start()
    service = f"gui/{os.getuid()}/{LABEL}"
    assert commands.calls == [
        f"launchctl print {service}",
        f"launchctl bootout {service}",
        *[f"launchctl print {service}"] * 3,
        f"launchctl enable {service}",
        f"launchctl bootstrap gui/{os.getuid()} {manager.file}",
    ]


def test_launchd_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, _ = launchd(monkeypatch, print=[GONE], bootstrap=[(125, "Domain does not support specified action")])
    with pytest.raises(FlashError, match=r"Domain does not support specified action. It has a place"):
        manager.start()
    manager, _ = launchd(monkeypatch, print=[(0, "")], bootout=[(1, "not permitted")])
    with pytest.raises(FlashError, match="does not stop the service: not permitted"):
        manager.stop()


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ((0, "x = {\n\tstate = running\n\tpid = 812\n\tlast exit code = 0\n}"), ServiceState(812, "")),
        ((0, "x = {\n\tstate = not running\n\tlast exit code = 1\n}"), ServiceState(None, "last exit code = 1")),
        ((0, "x = {\n\tlast exit code = (never exited)\n}"), ServiceState(None, "last exit code = (never exited)")),
        (GONE, ServiceState(None, "")),
    ],
)
def test_what_launchd_says(answer: tuple[int, str], state: ServiceState, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, _ = launchd(monkeypatch, print=[answer])
    assert manager.state() == state


def systemd(monkeypatch: pytest.MonkeyPatch, **answers: list[tuple[int, str]]) -> tuple[Systemd, Commands]:
    commands = Commands(**answers)
    monkeypatch.setattr(systemd_unit, "ran", commands)
    return Systemd(), commands


def test_systemd_starts_and_stops_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    manager, commands = systemd(monkeypatch, show=[(0, "LoadState=loaded\nActiveState=active\nMainPID=7\n")])
    manager.start()
    manager.stop()
    manager.forget()
    shown = "show --property=LoadState,ActiveState,MainPID,Result,ExecMainStatus,NRestarts"
    expected = ["daemon-reload", "enable", "reset-failed", "restart", shown, "stop", "disable", "daemon-reload"]
    named = [word if word == "daemon-reload" else f"{word} {UNIT}" for word in [*expected, "reset-failed"]]
    assert commands.calls == [f"systemctl --user {words}" for words in named]
    assert manager.state() == ServiceState(7, "")
    manager, commands = systemd(monkeypatch, show=[(0, "LoadState=not-found\nActiveState=inactive\nMainPID=0\n")])
    manager.stop()
    assert len(commands.calls) == 1 and manager.state() == ServiceState(None, "")


def test_systemd_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = "ActiveState=failed\nMainPID=0\nResult=exit-code\nExecMainStatus=203\nNRestarts=0\n"
    manager, _ = systemd(monkeypatch, restart=[(1, "See logs.")], show=[(0, failed)])
    with pytest.raises(FlashError, match=r"does not start the service: exit code 203 \(exit-code\), restarted 0 times"):
        manager.start()
    manager, _ = systemd(monkeypatch, show=[(0, "ActiveState=failed\nResult=signal\nExecMainStatus=6\nNRestarts=5\n")])
    assert manager.state() == ServiceState(None, "signal 6 (signal), restarted 5 times before")
    manager, _ = systemd(monkeypatch, show=[(1, "Failed to connect to bus: No medium found")])
    for ask in (manager.state, manager.stop):
        with pytest.raises(FlashError, match=r"Failed to connect to bus: No medium found\. A service needs a systemd"):
            ask()


def test_a_command_of_the_system_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "systemctl"
    program.write_text('#!/bin/sh\necho first >&2\necho "last: $2." >&2\nexit 4\n')
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FlashError, match="systemctl"):  # it is not executable
        ran("systemctl")
    program.chmod(0o755)
    done = ran("systemctl", "--user", "a b")
    assert (done.returncode, why(done)) == (4, "last: a b")
    assert why(subprocess.CompletedProcess([], 3, "", "")) == "exit code 3"
    with pytest.raises(FlashError, match="launchctl is not installed here"):
        ran("launchctl")
    program.write_text("#!/bin/sh\nwhile :; do :; done\n")
    monkeypatch.setattr(system_manager, "WAIT_S", 0.1)
    with pytest.raises(FlashError, match="timed out"):
        ran("systemctl")


# -- installing and removing -------------------------------------------------------------------------------------


class ScriptedManager(SystemManager):
    """pid: that of the service after a start. It keeps what it was told."""

    name, starts = "a script", "when you log in"

    def __init__(self, file: Path, pid: int | None = 7) -> None:
        self.file, self.pid, self.said, self.running = file, pid, list[str](), False

    def text(self, definition: Definition) -> bytes:
        return Systemd().text(definition)

    def command_in(self, text: bytes) -> list[str]:
        return Systemd().command_in(text)

    def start(self) -> None:
        self.said.append("start")
        self.running = True

    def stop(self) -> None:
        self.said.append("stop")
        self.running = False

    def state(self) -> ServiceState:
        return ServiceState(self.pid if self.running else None, "" if self.pid else "result exit-code, code 1")


@pytest.fixture
def fitting(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Lets every model fit, every port be free and every server answer at once; returns what changes that."""
    planned = SimpleNamespace(describe=lambda: "the plan")

    def say(error: Exception | None = None, answer: int | None = 503) -> None:
        def plan(*_: object, **__: object) -> Any:
            if error is not None:
                raise error
            return planned

        monkeypatch.setattr("mlx_flash.loading.load.plan", plan)
        monkeypatch.setattr(installing, "answer_of", lambda *_: answer)
        monkeypatch.setattr(service_status, "answer_of", lambda *_: answer)

    monkeypatch.setattr(installing, "LOOK_S", 0)
    monkeypatch.setattr(installing, "_require_package", lambda _: None)
    monkeypatch.setattr("mlx_flash.server.serving.bind", lambda *_: SimpleNamespace(close=lambda: None))
    say()
    return say


def try_to_install(
    manager: ScriptedManager, where: ServiceFiles, *words: str, key: str | None = None, said: list[str] | None = None
) -> None:
    given = [*words, *([f"--api-key={key}"] if key else [])]
    made = defined(*words, where=where, key=key is not None)
    server: argparse.Namespace = make_server_parser().parse_args(given)
    installing.install(made, server, manager, (said if said is not None else []).append)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_installing_again_changes_nothing_and_removing_leaves_nothing(tmp_path: Path, fitting: Any) -> None:
    manager = ScriptedManager(tmp_path / "units/x.service")
    where = ServiceFiles(tmp_path / "logs/server.log", tmp_path / "config/service-key")
    said: list[str] = []
    try_to_install(manager, where, "--port=9", key='s3cret $%"', said=said)
    assert said == ["the plan", said[1]] and "without --memory" in said[1]
    first = everything(tmp_path)
    assert first.keys() == {"units/x.service", "config/service-key"} and first["config/service-key"] == b's3cret $%"\n'
    assert b"s3cret" not in first["units/x.service"]
    assert {path.stat().st_mode & 0o777 for path in (manager.file, where.key)} == {0o600}
    try_to_install(manager, where, "--port=9", key='s3cret $%"')
    assert everything(tmp_path) == first and manager.said == ["start", "stop", "start"]
    try_to_install(manager, where, "--port=9", "--memory=6GB")
    assert everything(tmp_path).keys() == {"units/x.service"}  # no key any more
    for name in ("server.log", "server.log.1"):
        where.log.parent.mkdir(exist_ok=True)
        (where.log.parent / name).touch()
    assert installing.remove(manager, where) and not installing.remove(manager, where)
    assert everything(tmp_path) == {} and not where.log.parent.exists() and not where.key.parent.exists()


@pytest.mark.parametrize("runs", [True, False])
def test_what_cannot_start_is_not_installed(runs: bool, tmp_path: Path, fitting: Any) -> None:
    manager = ScriptedManager(tmp_path / "units/x.service")
    where = ServiceFiles(tmp_path / "logs/server.log", tmp_path / "config/service-key")
    fitting(BudgetError("the model needs 230 MB", 230_000_000))
    with pytest.raises(BudgetError):
        try_to_install(manager, where, "--memory=1MB", key="new")
    assert everything(tmp_path) == {} and "start" not in manager.said
    fitting()
    try_to_install(manager, where, "--port=9", key="old")
    before = everything(tmp_path)
    manager.running, manager.said = runs, []
    fitting(BudgetError("the model needs 230 MB", 230_000_000))
    with pytest.raises(BudgetError):
        try_to_install(manager, where, "--memory=1MB", key="new")
    assert everything(tmp_path) == before and manager.running == runs


def test_a_service_that_ends_at_once_is_removed(tmp_path: Path, fitting: Any) -> None:
    manager = ScriptedManager(tmp_path / "units/x.service", pid=None)
    where = ServiceFiles(tmp_path / "logs/server.log", tmp_path / "config/service-key")
    where.log.parent.mkdir()
    where.log.write_text("-- started --\nmlxflash server: the disk is gone\n\n")
    fitting(answer=None)
    with pytest.raises(FlashError, match=r"code 1\)\. It said: mlxflash server: the disk is gone"):
        try_to_install(manager, where)
    assert everything(tmp_path) == {} and not manager.running


def test_a_system_that_refuses_everything_leaves_nothing(tmp_path: Path, fitting: Any) -> None:
    class Refusing(ScriptedManager):
        def start(self) -> None:
            raise FlashError("no bus at the start")

        def stop(self) -> None:
            raise FlashError("no bus at the stop")

        forget = stop

    with pytest.raises(FlashError, match="at the start"):
        try_to_install(Refusing(tmp_path / "x.service"), ServiceFiles(tmp_path / "log", tmp_path / "key"), key="secret")
    assert everything(tmp_path) == {}


def test_a_service_that_takes_its_time_stays(tmp_path: Path, fitting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installing, "START_S", 0)
    fitting(answer=None)
    said: list[str] = []
    manager = ScriptedManager(tmp_path / "units/x.service")
    try_to_install(manager, ServiceFiles(tmp_path / "log", tmp_path / "key"), "--memory=6GB", said=said)
    assert manager.running and "has not answered" in said[-1]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, fitting: Any) -> None:
    (tmp_path / "units").write_text("a file")
    manager = ScriptedManager(tmp_path / "units/x.service")
    with pytest.raises(FlashError, match="cannot be written"):
        try_to_install(manager, ServiceFiles(tmp_path / "log", tmp_path / "key"))
    assert everything(tmp_path) == {"units": b"a file"}


def test_a_package_of_the_present_folder_alone_is_refused(tmp_path: Path) -> None:
    installing._require_package(defined())
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(FlashError, match="Install it first"):
        installing._require_package(defined(python=str(program)))


# -- status ------------------------------------------------------------------------------------------------------


def test_status(tmp_path: Path, fitting: Any, capsys: pytest.CaptureFixture[str]) -> None:
    manager = ScriptedManager(tmp_path / "x.service")
    where = ServiceFiles(tmp_path / "server.log", tmp_path / "key")
    assert service_status.show(manager, where) == 1 and "there is no service" in capsys.readouterr().out
    manager.file.write_text("[Service]\nExecStart=/bin/true\n")
    assert service_status.show(manager, where) == 1 and "was not written by" in capsys.readouterr().out
    where.log.write_text("".join(f"line {number}\n\n" for number in range(99)))
    manager.file.write_bytes(manager.text(defined("--host=::", "--port=9", "--name=a b")))
    manager.running = True
    assert service_status.show(manager, where) == 0
    shown = capsys.readouterr().out
    assert "running: process 7, http://[::1]:9, it is loading its model\n" in shown
    assert f"log: {where.log}\n  line 94\n" in shown and shown.endswith("  line 98\n") and "'--name=a b'" in shown
    manager.running, manager.pid = False, None
    manager.file.write_bytes(manager.text(defined("--name=a b", python="/gone/bin/python", key=True)))
    assert service_status.show(manager, where) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("not running: result exit-code, code 1\n")
    assert "/gone/bin/python, is gone" in shown and f"with {KEY_VARIABLE} set" in shown
    assert shown.endswith("\n  mlxflash service install '--name=a b'\n")


@pytest.mark.parametrize(
    ("flags", "url"),
    [
        ([], "http://127.0.0.1:8080"),
        (["--host=0.0.0.0", "--port=1"], "http://127.0.0.1:1"),
        (["--host=::1"], "http://[::1]:8080"),
        (["--host=mac.local"], "http://mac.local:8080"),
    ],
)
def test_the_address_of_a_service(flags: list[str], url: str) -> None:
    assert service_status.url_of_address(*service_status.address_of(flags)) == url


def test_nothing_answers(tmp_path: Path) -> None:
    assert service_status.answer_of("127.0.0.1", 1) is None
    assert service_status.last_lines(tmp_path / "none", 5) == []


# -- what the system starts --------------------------------------------------------------------------------------


def started(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlx_flash.service.start", *words]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_the_server_writes_into_the_log_and_gets_the_key(tmp_path: Path) -> None:
    log, key = tmp_path / "logs/server.log", tmp_path / "key"
    key.write_text("no header can carry this: ü\n")
    done = started(f"--log={log}", f"--key={key}", "--", "--port=0")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    head, said = log.read_text().splitlines()
    assert head.startswith("-- ") and "the API key is empty or has characters" in said
    assert log.stat().st_mode & 0o777 == 0o600
    done = started(f"--log={log}", f"--key={tmp_path / 'none'}", "--", "--port=0")
    assert done.returncode == 1 and "cannot be read: No such file" in log.read_text().splitlines()[-1]


def test_the_log_stays_bounded(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time; from mlx_flash.service import start\n"
        "log = pathlib.Path(sys.argv[1]); start.log_into(log, 1000); start.keep_bounded(log, 1000, 0.001)\n"
        "for number in range(200):\n"
        "    print('x' * 99, flush=True); time.sleep(0.002 * (number % 10 == 9))\n"
        "while log.stat().st_size > 1000: time.sleep(0.01)\n"
    )
    log = tmp_path / "server.log"
    subprocess.run([sys.executable, "-c", program, str(log)], check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["server.log", "server.log.1"]
    assert log.stat().st_size <= 1000


def test_a_long_log_is_moved_at_the_start(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_bytes(b"x" * 11)
    kept = [os.dup(number) for number in (1, 2)]
    try:
        log_into(log, 10)
    finally:
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)
    assert log.read_bytes() == b"" and (tmp_path / "server.log.1").read_bytes() == b"x" * 11
