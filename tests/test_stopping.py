"""A signal ends any command, whatever it waits for. Real processes wait here for events that never come."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import Tiny, change_manifest  # type: ignore[import-not-found]
from hub_server import Hub, serve  # type: ignore[import-not-found]
from processes import has_ended  # type: ignore[import-not-found]
from serving import PATIENCE_S, until  # type: ignore[import-not-found]

from mlx_flash.cli.run import run_command
from mlx_flash.source.resolve import cached_store_path

TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP

# A command of this package with less patience than for users: python -c COMMAND module arguments
COMMAND = """
import runpy, sys
from mlx_flash.cli import stopping
from mlx_flash.source import children
stopping.GRACE_S = children.TERMINATED_S = children.INTERRUPTED_S = 0.3
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""

# A command that runs `work`, which prints "ready" when it begins to wait.
PROGRAM = """
import argparse, concurrent.futures, contextlib, ctypes, os, sys, threading, time
from mlx_flash.cli import stopping
from mlx_flash.cli.run import run_command
from mlx_flash.server.__main__ import Signals
from mlx_flash.cli.terminal import Interrupts
stopping.GRACE_S = 0.3
c, gil = ctypes.CDLL(None), ctypes.PyDLL(None)
def ready():
    os.write(1, b"ready\\n")
def forever():
    time.sleep(10**6)
def ready_and_stuck_in_c():  # no signal interrupts it
    mutex, gate = ctypes.create_string_buffer(256), threading.Lock()
    gil.pthread_mutex_init(mutex, None)
    gil.pthread_mutex_lock(mutex)
    def tell():
        with gate:
            ready()
    with gate:
        threading.Thread(target=tell, daemon=True).start()
        sys.setswitchinterval(10**6)  # until this thread is in C, the other one waits for the interpreter's lock
    c.pthread_mutex_lock(mutex)
def main(_):
    {work}
run_command(argparse.ArgumentParser(prog="waits"), main)
"""

WORK = {
    "the main thread waits in C": "ready_and_stuck_in_c()",
    "a thread keeps the interpreter's lock": """
    def hold():
        gil.write(1, b"ready\\n", 6)
        gil.sleep(10**6)
    sys.setswitchinterval(10**6)  # not even for a moment between those two may another thread run
    threading.Thread(target=hold, daemon=True).start()
    forever()""",
    "a thread does not end": "threading.Thread(target=forever).start(); ready(); forever()",
    "an executor's thread does not end": """
    concurrent.futures.ThreadPoolExecutor().submit(forever)
    ready()
    forever()""",
    "nobody reads its output": """
    ready()
    os.set_blocking(1, True)
    while True:
        print("x" * 1000, flush=True)""",
    "the exception is swallowed": """
    while True:
        try:
            ready()
            forever()
        except BaseException:
            pass""",
}


@contextlib.contextmanager
def started(*command: object, **options: object) -> Iterator[subprocess.Popen[str]]:
    """Starts Python with its output in pipes, and kills it at the end."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=pipe, stderr=pipe, text=True, **options  # type: ignore[call-overload]
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def start_all(programs: Sequence[str], stack: contextlib.ExitStack) -> list[subprocess.Popen[str]]:
    """Starts all programs and waits until each waits itself. They use no processor after the signal."""
    processes = [stack.enter_context(started("-c", program)) for program in programs]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    return processes


def errors_of(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=PATIENCE_S)[1]


def test_a_stop_ends_a_command_that_waits_for_ever() -> None:
    cases = [(name, number) for name in WORK for number in (TERM, INT)]
    with contextlib.ExitStack() as stack:
        processes = start_all([PROGRAM.replace("{work}", WORK[name]) for name, _ in cases], stack)
        for process, (_, number) in zip(processes, cases, strict=True):
            process.send_signal(number)
        for process, (name, number) in zip(processes, cases, strict=True):
            process.wait(PATIENCE_S)  # wait before reading its output, because one of them has a full pipe
            errors = errors_of(process)
            assert process.returncode == {TERM: 143, INT: 130}[number], (name, number, errors)
            assert "Traceback" not in errors, (name, errors)
            if name != "nobody reads its output":  # which ends in its own way
                assert "waits: ended without waiting" in errors, (name, errors)


EARLY = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN if IGNORED else signal.SIG_DFL)  # not as this suite was started
sys.argv = ["/bin/mlxflash", COMMAND] if BY_SCRIPT else ["-m"]
sys.orig_argv = ["python", "-m", f"mlx_flash.{COMMAND}"]
import mlx_flash
sys.argv = ["/elsewhere/__main__.py"]
os.kill(os.getpid(), NUMBER)
"""


def test_a_stop_while_modules_are_imported() -> None:
    """Before `run_command`: no traceback, and the same exit code as later."""
    cases = [
        (command, script, number, False, {INT: 130, TERM: 0 if command == "server" else 143, HUP: 129}[number])
        for command in ("server", "generate")
        for script in (True, False)
        for number in (INT, TERM, HUP)
    ]
    cases.append(("generate", True, HUP, True, 0))  # `nohup` ignores the signal, so the program runs to its end
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                started(
                    "-c", f"COMMAND, BY_SCRIPT, NUMBER, IGNORED = {command!r}, {script}, {number:d}, {ignored}\n{EARLY}"
                )
            )
            for command, script, number, ignored, _ in cases
        ]
        for process, case in zip(processes, cases, strict=True):
            assert (errors_of(process), process.returncode) == ("", case[-1]), case


def test_the_exit_codes_of_run_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """While the server loads its libraries, before it has handlers of its own, its exit code is the same as later."""
    monkeypatch.setattr("sys.argv", ["program"])
    before = {number: signal.getsignal(number) for number in (TERM, HUP)}

    def code_after(number: signal.Signals, **options: int) -> Any:
        with pytest.raises(SystemExit) as exit:
            run_command(argparse.ArgumentParser(), lambda _: os.kill(os.getpid(), number), **options)
        assert capsys.readouterr().err == ""
        return exit.value.code

    try:
        assert code_after(TERM) == 143 and code_after(TERM, terminated=0) == 0
        signal.signal(HUP, signal.SIG_DFL)
        assert code_after(HUP) == 129
        signal.signal(HUP, signal.SIG_IGN)  # as `nohup` does
        assert code_after(HUP) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ctrl_c_within_a_text_that_is_executed_ends_with_130() -> None:
    """dataclasses are made by exec. Python would end itself by the signal, although it was caught."""
    program = PROGRAM.replace("{work}", 'exec("import signal; signal.raise_signal(2)")').replace(
        "run_command(",
        "import signal; from mlx_flash.cli import beginning\nsignal.signal(2, beginning._end)\nrun_command(",
    )
    with started("-c", program) as process:
        assert "interrupted" in errors_of(process) and process.returncode == 130


@pytest.mark.parametrize("number", [INT, TERM])
def test_a_stop_while_an_error_is_told_gives_no_traceback(number: signal.Signals) -> None:
    work = f"""
    from mlx_flash.source import failures
    def sentence(error):
        signal.raise_signal({number:d})
        return "a sentence"
    failures.sentence = sentence
    raise ZeroDivisionError"""
    with started(
        "-c", PROGRAM.replace("{work}", work).replace("import argparse,", "import signal, argparse,")
    ) as process:
        assert errors_of(process) == "waits: a sentence\n" and process.returncode == 1


@pytest.mark.parametrize("pause_s", [0.01, 0.0])  # Without a pause it would come again before Python has reported it.
@pytest.mark.parametrize(("number", "code"), [(INT, 130), (TERM, 143)])
def test_a_stop_within_a_destructor_is_not_lost(number: signal.Signals, code: int, pause_s: float) -> None:
    """Python reports exceptions of a destructor and continues."""
    work = f"""
    from mlx_flash.cli import beginning
    beginning.AGAIN_S = {pause_s}
    class Dying:
        def __del__(self):
            os.kill(os.getpid(), {number:d})
            for _ in range(1000):
                pass
    Dying()
    forever()"""
    with started("-c", PROGRAM.replace("0.3", "600").format(work=work)) as process:
        errors = errors_of(process)
        assert process.returncode == code and "Traceback" not in errors and "without waiting" not in errors, errors


def test_a_command_that_has_ended_does_not_wait_for_its_threads() -> None:
    threads = ("threading.Thread(target=forever)", "concurrent.futures.ThreadPoolExecutor().submit(forever)")
    ends = {"return 3": 3, "raise OSError('broken')": 1}
    cases = [(thread, end) for thread in threads for end in ends]
    with contextlib.ExitStack() as stack:
        programs = [
            PROGRAM.replace("{work}", f"{thread}{'.start()' * ('Thread(' in thread)}; ready(); {end}")
            for thread, end in cases
        ]
        for process, (_, end) in zip(start_all(programs, stack), cases, strict=True):
            assert process.wait(PATIENCE_S) == ends[end]


def test_the_third_ctrl_c_ends_a_chat_that_hangs() -> None:
    """The first two end at most an answer, and are forgotten with the next line."""
    work = """
    with Interrupts("once more") as interrupts:
        ready()
        sys.stdin.readline()
        interrupts.renew()
        ready_and_stuck_in_c()"""
    with started("-c", PROGRAM.replace("{work}", work), stdin=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(2):
            process.send_signal(INT)
        process.stdin.write("a line\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ready\n"
        for _ in range(3):  # the kernel may merge two signals that come together; this test sends them apart
            assert process.poll() is None
            process.send_signal(INT)
            until(lambda: not signals_pending(process))
        process.wait(PATIENCE_S)
        assert process.returncode == 130, errors_of(process)


def signals_pending(process: subprocess.Popen[str]) -> bool:
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():  # not Linux
        import time

        time.sleep(0.2)
        return False
    masks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(int(mask, 16) for mask in masks)


def test_a_server_that_hangs_ends_as_it_was_told() -> None:
    work = """
    class Engine:
        stoppable = True
        def stop(self): pass
    with Signals(Engine()):
        ready_and_stuck_in_c()"""
    for numbers, code in (((TERM,), 0), ((INT,), 130), ((TERM, TERM), 0)):
        with started("-c", PROGRAM.replace("{work}", work)) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            for number in numbers:
                process.send_signal(number)
            assert process.wait(PATIENCE_S) == code


# -- children -------------------------------------------------------------------------------------------------

PARENT = """
import sys
from mlx_flash.source import children
children.TERMINATED_S = children.INTERRUPTED_S = 0.3
def main(_):
    return children.run_child([sys.executable, "-c", sys.stdin.readline()])
import argparse
from mlx_flash.cli.run import run_command
run_command(argparse.ArgumentParser(prog="parent"), main)
"""
CHILD = "import signal,sys,time; {handler}; print('child', flush=True, file=sys.stderr); time.sleep(10**6)\n"
IGNORES = "[signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)]"


@contextlib.contextmanager
def parent_of(child: str) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    with started("-c", PARENT, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(child)
        process.stdin.flush()
        assert process.stderr.readline() == "child\n"
        (found,) = psutil.Process(process.pid).children()
        yield process, found


@pytest.mark.parametrize("handler", ["pass", IGNORES], ids=["obeys", "ignores"])
@pytest.mark.parametrize(("number", "code"), [(INT, 130), (TERM, 143)])
def test_a_stop_ends_the_child_first(handler: str, number: int, code: int) -> None:
    """Covers a child that ignores the signal, and one that got no Ctrl-C because no terminal sent it."""
    with parent_of(CHILD.format(handler=handler)) as (process, child):
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == code, errors_of(process)
        assert not child.is_running()


def test_a_child_ends_with_a_parent_that_is_killed() -> None:
    lifeline = "from mlx_flash.cli.stopping import end_with_stdin; end_with_stdin()"
    with parent_of(CHILD.format(handler=lifeline)) as (process, child):
        process.kill()
        process.wait(PATIENCE_S)
        until(lambda: has_ended(child))


# -- real commands --------------------------------------------------------------------------------------------


def test_a_server_that_converts_ends_with_its_child(tiny: Tiny, tmp_path: Path) -> None:
    environment = {**os.environ, "MLX_FLASH_CACHE": str(tmp_path)}
    command = ("-c", COMMAND, "mlx_flash.server", "--port", "0", "--model", tiny.checkpoint)
    with started(*command, env=environment) as process:
        assert process.stderr is not None
        # Look for children only after this line, because each look reads files of every process on this machine.
        assert any("converting" in line for line in process.stderr)
        known = psutil.Process(process.pid)
        until(known.children)
        children = known.children()
        process.send_signal(TERM)
        errors = errors_of(process)
        assert process.returncode == 0 and "Traceback" not in errors, errors
        _, alive = psutil.wait_procs(children, timeout=PATIENCE_S)
        assert not alive


@pytest.mark.parametrize(("number", "code", "lock"), [(INT, 130, ".{}.lock"), (TERM, 143, "{}.lock")])
def test_a_stop_ends_the_wait_for_another_process(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int, lock: str
) -> None:
    """The other process began before, or is the conversion of a killed one."""
    from filelock import FileLock

    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path))
    target, _ = cached_store_path(tiny.checkpoint, str(tiny.checkpoint))
    with FileLock(tmp_path / lock.format(target.name)):
        with started("-c", COMMAND, "mlx_flash.generate", "--model", tiny.checkpoint) as process:
            assert process.stderr is not None
            assert "waiting for another process" in process.stderr.readline()
            process.send_signal(number)
            errors = errors_of(process)
        assert process.returncode == code and "Traceback" not in errors, errors


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


@pytest.mark.parametrize(("file", "number", "code"), [("tokenizer.json", INT, 130), ("model.safetensors", TERM, 143)])
def test_a_stop_ends_a_download_that_hangs(
    hub: Hub, tiny: Tiny, tmp_path: Path, file: str, number: int, code: int
) -> None:
    """Covers downloads by huggingface_hub in threads, and by hub.py."""
    source = Path(shutil.copytree(tiny.checkpoint, tmp_path / "source"))
    with (source / "model.safetensors").open("ab") as weights:
        weights.truncate(12_000_000)  # large enough that hub.py fetches it itself
    hub.add("owner/model", source)
    hub.stall_at = {file: 100}
    hub.stalled.clear()
    environment = hub.environment(tmp_path / "home")
    command = ["-c", COMMAND, "mlx_flash.convert", "--model", "owner/model", "--output", tmp_path / "store"]
    with started(*command, env=environment) as process:
        assert hub.stalled.wait(PATIENCE_S)
        process.send_signal(number)
        errors = errors_of(process)
    assert process.returncode == code and "Traceback" not in errors, errors


def test_a_stop_ends_a_template_without_an_end(own_store: Path) -> None:
    path = own_store / "tokenizer_config.json"
    template = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"  # noqa: E501
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    change_manifest(own_store)
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s"
    with started("-c", COMMAND, "mlx_flash.server", "--port", "0", "--model", own_store) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().rsplit(":", 1)[1])
        until(lambda: health(port) == 200)
        known = psutil.Process(process.pid)
        before = known.num_threads() + len(known.children())
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
            client.sendall(request % (len(body), body))
            until(lambda: known.num_threads() + len(known.children()) > before)  # the template is being rendered
            process.send_signal(TERM)
            errors = errors_of(process)
        assert process.returncode == 0 and "Traceback" not in errors, errors


def health(port: int) -> int:
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return int(client.makefile("rb").readline().split()[1])


def test_ctrl_c_in_the_import_of_a_compiled_module() -> None:
    program = """
import argparse, os, signal, sys, time
sys.argv = ["mlxflash"]
from mlx_flash.cli.run import run_command

def main(_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    except KeyboardInterrupt:
        raise ImportError("initialising the extension failed") from None

run_command(argparse.ArgumentParser(prog="x"), main)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (130, "\nx: interrupted\n")
