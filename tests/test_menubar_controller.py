"""The menu bar app's controller against the real server with the packaged demo model, without a toolkit."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import gated_server  # type: ignore[import-not-found]
import psutil
import pytest
from processes import has_ended, runs  # type: ignore[import-not-found]  # beside this file

from mlx_flash.apps.menubar import budgets, wording
from mlx_flash.apps.menubar import controller as controllers
from mlx_flash.apps.menubar.budgets import Budget, fixed_budgets, planned_budgets
from mlx_flash.apps.menubar.controller import FAILED, RUNNING, STARTING, STOPPED, STOPPING, Controller, State
from mlx_flash.apps.menubar.server_process import EngineProcess, server_command, why_it_ended
from mlx_flash.apps.menubar.settings import RECENT_MODELS, AppSettings, read_settings, write_settings
from mlx_flash.loading.plan import ENDLESS, Demand, Plan, PlanNotes, UnitCounts

SECONDS = 600.0  # limit of waits for events that come at once on an idle machine
QUESTION = "It was a dark night, and"


@pytest.fixture(autouse=True)
def no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disables plans, because each is a process that imports MLX. Tests about budgets enable them (`ask_the_plan`)."""
    monkeypatch.setattr(controllers, "planned_budgets", lambda _: None)


@pytest.fixture
def ask_the_plan(no_plan: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """An event. The app asks for plans once the test sets it."""
    asked = threading.Event()

    def planned(model: str | None) -> Any:
        asked.wait()
        return planned_budgets(model)

    monkeypatch.setattr(controllers, "planned_budgets", planned)
    yield asked
    asked.set()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Controller]]:
    made: list[Controller] = []

    def make_controller(**options: Any) -> Controller:
        made.append(Controller(tmp_path / "menubar.json", **options))
        return made[-1]

    yield make_controller
    for controller in made:
        controller.close()


def wait_for(controller: Controller, condition: Callable[[State], object]) -> State:
    return until(lambda: state if condition(state := controller.state) else None, lambda: controller.state)


def until(value: Callable[[], Any], otherwise: Callable[[], object] = lambda: "") -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := value()):
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.05)
    return found


def budget_of(state: State) -> object:
    return state.stats and state.stats["memory"]["budget_bytes"]


def running(controller: Controller) -> State:
    state = wait_for(controller, lambda state: state.phase in (RUNNING, FAILED))
    assert state.phase == RUNNING, (state.trouble, state.last_lines)
    return state


def engine_of(pid: int, program: str) -> psutil.Process:
    """The server among the child processes of `pid`."""
    (found,) = [child for child in psutil.Process(pid).children() if runs(child, program)]
    return found


def test_asks_starts_again_after_it_was_killed_and_with_another_budget_and_stops(
    make: Callable[..., Controller], ask_the_plan: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine answers, stops speaking when told to, is killed, gets other budgets, and is stopped."""
    held = tmp_path / "held"
    monkeypatch.setenv(gated_server.VARIABLE, str(held))
    monkeypatch.setattr(controllers, "MAX_TOKENS", 40)
    phases: list[str] = []
    answers: list[str] = []

    def note() -> None:
        if made:
            phases.append(made[0].state.phase)
            answers.append(made[0].state.answer)

    made: list[Controller] = []
    command = lambda *model: [*gated_server.COMMAND, *server_command(*model)[3:]]  # noqa: E731
    made.append(controller := make(on_change=note, command=command))
    assert controller.state.phase == STOPPED and controller.state.budgets == fixed_budgets()
    controller.start()
    state = first = running(controller)
    assert state.endpoint == f"{state.address}/v1" and state.address.startswith("http://127.0.0.1:")
    state = wait_for(controller, lambda state: state.stats is not None)
    assert state.stats is not None and state.stats["totals"]["requests"] == 0

    controller.ask(QUESTION)
    state = wait_for(controller, lambda state: not state.answering)
    assert state.answer and not state.answer_trouble
    grown = list(dict.fromkeys(answers))
    assert len(grown) > 3 and all(after.startswith(before) for before, after in pairwise(grown))
    state = wait_for(controller, lambda state: state.stats is not None and state.stats["last"] is not None)
    assert state.stats is not None
    assert "tokens per second" in wording.headline(state)
    assert state.stats["totals"]["generated_tokens"] >= len(grown) - 1

    gated_server.hold(held, 20)
    controller.ask(QUESTION)
    state = wait_for(controller, lambda state: state.tokens_per_second and state.answer)
    assert state.answering and state.tokens_per_second
    assert wording.icon_text(state) == wording.rate_text(state.tokens_per_second)
    controller.cancel()
    state = controller.state
    assert not state.answering
    wait_for(controller, lambda state: state.stats is not None and state.stats["now"] is None)  # also in the engine
    assert controller.state.answer == state.answer and not controller.state.answer_trouble

    engine_of(os.getpid(), gated_server.__file__).kill()
    state = wait_for(controller, lambda state: state.phase == FAILED)
    assert "SIGKILL" in state.trouble and "Out of memory?" in state.trouble and not state.endpoint
    assert wording.start_or_stop(state) == "Start the engine again" and wording.icon_text(state) == "!"
    controller.ask(QUESTION)
    assert "is not running" in controller.state.answer_trouble
    controller.start()
    again = running(controller)
    assert again.address != first.address and not again.trouble

    ask_the_plan.set()
    points = wait_for(controller, lambda state: state.budgets != fixed_budgets()).budgets
    assert points[-1].note == "all neurons in memory"  # the demo is small, so this may also be the smallest budget
    assert [point.size for point in points] == sorted({point.size for point in points})
    for point in dict.fromkeys((points[0], points[-1])):  # accepted by the server, a larger process than the plan's
        controller.choose_budget(point.size)
        wait_for(controller, lambda state, point=point: budget_of(state) == point.size)  # type: ignore[misc]
    assert again.settings.budget is None
    until(lambda: read_settings(tmp_path / "menubar.json").budget == points[-1].size)

    engine = engine_of(os.getpid(), gated_server.__file__)
    controller.stop()
    state = wait_for(controller, lambda state: state.phase == STOPPED)
    assert has_ended(engine) and not state.endpoint and state.stats is None and not state.trouble
    until(lambda: phases[-1] == STOPPED)  # told after the state has changed
    assert [phase for phase, _ in groupby(phases)][-4:] == [STARTING, RUNNING, STOPPING, STOPPED]


def test_a_folder_that_is_missing_or_holds_no_model(make: Callable[..., Controller], tmp_path: Path) -> None:
    controller = make()
    controller.choose_model(str(tmp_path / "gone"))
    controller.start()
    state = wait_for(controller, lambda state: state.phase == FAILED)
    assert str(tmp_path / "gone") in state.trouble and "is neither a folder" in state.trouble
    empty = tmp_path / "empty"
    empty.mkdir()
    controller.choose_model(str(empty))
    controller.start()
    state = wait_for(controller, lambda state: state.phase == FAILED and "empty" in state.trouble)
    assert "config.json" in state.trouble
    assert state.settings.recent == (str(empty), str(tmp_path / "gone"))


def test_a_budget_too_small_is_refused_with_the_one_that_would_do(make: Callable[..., Controller]) -> None:
    controller = make()
    controller.choose_budget(10_000_000)
    controller.start()
    state = wait_for(controller, lambda state: state.phase == FAILED)
    assert "this model needs at least" in state.trouble


ENGINE = "import time; print('Serving at {}', flush=True); time.sleep(600)"


class Ready(BaseHTTPRequestHandler):
    """A server with a loaded model."""

    def do_GET(self) -> None:
        body = json.dumps({"status": "ok"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_the_plan_is_asked_again_only_where_it_could_not_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model was not downloaded and converted before. A known plan outlives the engine, but not the model."""
    points = (Budget(10**9, "the smallest"),)
    plans = [None, points]
    asked: list[str | None] = []

    class Asking(Controller):
        def _ask_for_budgets(self) -> None:
            asked.append(self.state.settings.model)
            super()._ask_for_budgets()

    monkeypatch.setattr(controllers, "planned_budgets", lambda _: plans.pop(0) if plans else None)
    with ThreadingHTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        program = ENGINE.format(f"http://127.0.0.1:{server.server_port}")
        controller = Asking(tmp_path / "settings", command=lambda *_: [sys.executable, "-c", program])
        until(lambda: plans == [points])
        assert asked == [None]
        controller.start()
        wait_for(controller, lambda state: state.budgets == points and state.phase == RUNNING)
        controller.stop()
        wait_for(controller, lambda state: state.phase == STOPPED)
        controller.start()
        wait_for(controller, lambda state: state.stats is not None)  # fetched after the server was ready
        assert asked == [None, None] and controller.state.budgets == points
        plans.append(None)
        controller.choose_model("a/b")
        assert asked[:3] == [None, None, "a/b"] and controller.state.budgets == fixed_budgets()
        controller.close()
        server.shutdown()


def test_a_plan_that_cannot_be_asked_gives_no_budgets(tmp_path: Path) -> None:
    assert planned_budgets(str(tmp_path)) is None
    assert planned_budgets("nobody/has-this-model") is None


def plan_with(smallest: int, everything: int, units_bytes: int) -> Plan:
    units = UnitCounts(1, units_bytes, 0, "units")
    return Plan(ENDLESS, Demand(0, 0, 0, 0, 0), units, (0,), 1, 64, PlanNotes(), 0, smallest, everything)


def test_the_points_of_a_plan_grow_and_leave_out_what_is_no_more() -> None:
    ample = plan_with(1_000 * 10**6, 5_000 * 10**6, 4_100 * 10**6)
    found = budgets.points(ample, "experts")
    assert [point.note for point in found] == [
        *("the smallest", "a quarter of the experts in memory"),
        *("half of the experts in memory", "all experts in memory"),
    ]
    assert [point.size for point in found] == sorted(point.size for point in found)
    assert found[-1].size >= ample.everything
    tiny = budgets.points(plan_with(253 * 10**6, 261 * 10**6, 8 * 10**6), "neurons")
    assert [point.note for point in tiny] == ["the smallest", "all neurons in memory"]
    assert len(budgets.points(plan_with(1_000 * 10**6, 1_001 * 10**6, 900_000), "neurons")) == 1


APP = """
import sys, time
from pathlib import Path
from mlx_flash.apps.menubar.controller import Controller
controller = Controller(Path(sys.argv[1]))
controller.start()
while True:
    print(controller.state.phase, flush=True)
    time.sleep(0.1)
"""


@pytest.mark.parametrize("module", ["mlx_flash.convert", "mlx_flash.server"], ids=["converting", "running"])
def test_nothing_survives_an_app_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Neither the engine survives nor the process that converts the model for it."""
    if module == "mlx_flash.convert":
        monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    app = subprocess.Popen([sys.executable, "-c", APP, str(tmp_path / "settings")], stdout=subprocess.PIPE, text=True)
    try:
        assert app.stdout is not None
        if module == "mlx_flash.server":
            assert any(line.strip() == RUNNING for line in app.stdout)
        known = psutil.Process(app.pid)
        until(lambda: any(runs(child, module) for child in known.children(recursive=True)))
        family = known.children(recursive=True)
    finally:
        app.kill()
        app.communicate()
    until(lambda: all(has_ended(process) for process in family), lambda: family)


def test_closing_ends_the_engine_and_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing also ends an engine that ignores SIGTERM, and its child."""
    monkeypatch.setattr(EngineProcess.stop, "__defaults__", (0.3,))  # shorter than the patience for users
    program = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print('child', child.pid, file=sys.stderr, flush=True)\n"
        "time.sleep(600)\n"
    )
    controller = Controller(tmp_path / "settings", command=lambda *_: [sys.executable, "-c", program])
    controller.start()
    state = wait_for(controller, lambda state: state.progress.startswith("child"))
    child = psutil.Process(int(state.progress.split()[1]))
    engine = psutil.Process(child.ppid())
    controller.close()
    until(lambda: has_ended(engine) and has_ended(child))
    controller.close()  # closing twice does no harm
    controller.start()
    assert controller.state.phase == STOPPED


def test_an_engine_that_cannot_be_started_or_ends_at_once(tmp_path: Path) -> None:
    commands = [["/no/such/program"], [sys.executable, "-c", "raise SystemExit('I will not')"]]
    controller = Controller(tmp_path / "settings", command=lambda *_: commands.pop(0))
    controller.start()
    state = wait_for(controller, lambda state: state.phase == FAILED)
    assert "/no/such/program" in state.trouble
    controller.start()
    state = wait_for(controller, lambda state: state.trouble == "I will not")
    assert state.phase == FAILED and state.last_lines == ("I will not",)
    controller.close()


def test_the_app_s_process_imports_neither_mlx_nor_a_toolkit() -> None:
    program = (
        "import sys\n"
        "import mlx_flash.apps.menubar.controller, mlx_flash.apps.menubar.wording\n"
        "print([name for name in ('mlx', 'mlx_lm', 'numpy', 'toga', 'PySide6', 'PIL') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_a_packaged_app_is_its_own_interpreter() -> None:
    command = [sys.executable, "-m", "mlx_flash.apps.menubar", "-m", "mlx_flash.check", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m mlx_flash.check")


def test_the_lifeline_ends_a_process_that_ignores_it() -> None:
    program = (
        "import signal, time\n"
        "from mlx_flash.cli.stopping import end_with_stdin\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "end_with_stdin(grace_seconds=0.2)\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(SECONDS) == -signal.SIGKILL
    child.stdout.close()


@pytest.mark.parametrize(
    ("code", "lines", "expected"),
    [
        (-9, ["loading"], r"ended by SIGKILL\. Out of memory\?"),
        (-6, ["libc++abi: terminating"], r"ended by SIGABRT\. Out of memory\?"),
        (-15, [], r"^The engine was ended by SIGTERM\.$"),
        (-11, ["a", "b"], r"SIGSEGV\. Its last message: b"),
        (2, ["usage: python -m mlx_flash.server", "python -m mlx_flash.server: no folder x."], r"^no folder x\.$"),
        (1, ["", "usage: x"], r"exit code 1 and without a message"),
    ],
)
def test_why_it_ended(code: int, lines: list[str], expected: str) -> None:
    assert re.search(expected, why_it_ended(code, lines))


def test_settings_come_back_and_damaged_ones_are_left(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "menubar.json"
    assert read_settings(file) == AppSettings()
    settings = AppSettings().with_budget(5).with_model("a/b").with_budget(7).with_model("/c")
    assert (settings.model, settings.recent, settings.budget) == ("/c", ("/c", "a/b"), None)
    write_settings(file, settings)
    assert read_settings(file) == settings and [path.name for path in file.parent.iterdir()] == ["menubar.json"]
    assert settings.with_model(None).budget == 5 and settings.with_model("a/b").budget == 7
    for n in range(20):
        settings = settings.with_model(f"x/{n}")
    assert len(settings.recent) == RECENT_MODELS and settings.recent[0] == "x/19"
    for damaged in (
        b"",
        b"\xff",
        b"[1]",
        b'{"model": 3, "recent": "x", "memory": []}',
        b'{"memory": {"": -1, "a": "b"}}',
    ):
        file.write_bytes(damaged)
        assert read_settings(file) == AppSettings()
    file.write_text(json.dumps({"model": "a/b", "recent": ["a/b", 3], "memory": {"a/b": 9, "c": True}}))
    assert read_settings(file) == AppSettings("a/b", ("a/b",), {"a/b": 9})


def test_the_command_names_model_and_memory() -> None:
    assert server_command(None, None)[1:] == ["-m", "mlx_flash.server", "--port", "0", "--exit-with-stdin"]
    assert server_command("a/b", 2 * 10**9)[-4:] == ["--model", "a/b", "--memory", "2000000000B"]


def test_what_the_menu_says() -> None:
    settings = AppSettings().with_model("/models/opt").with_model("a/b").with_budget(10**9)
    state = State(settings, budgets=(Budget(10**9, "the smallest"), Budget(25 * 10**8, "")))
    assert wording.headline(state) == "Stopped" and wording.icon_text(state) == "off"
    assert wording.model_label("a/b", state) == "✓ a/b" and wording.model_label("/models/opt", state).strip() == "opt"
    assert wording.budget_label(state.budgets[0], state, 5 * 10**8) == "✓ 1 GB: the smallest (more than is free)"
    assert wording.budget_label(state.budgets[1], state, 10**10).strip() == "2.5 GB"
    assert wording.budget_label(None, state).strip().startswith("Automatic")
    starting = State(settings, phase=STARTING, progress="converting " + 100 * "x")
    assert wording.headline(starting).startswith("Starting: converting xx")
    assert len(wording.headline(starting)) <= wording.LINE_CHARACTERS
    assert wording.headline(State(settings, phase=STOPPING)) == "Stopping"
    now = {"tokens_per_second": 12.34, "generated_tokens": 5, "bytes_per_token": 2.4e6, "hit_rate": 0.914}
    state = State(settings, phase=RUNNING, stats={"now": now, "last": None})
    assert wording.headline(state) == "12 tokens per second · 2 MB per token · hits 91%"
    assert wording.icon_text(state) == "12"
    assert len(wording.padded("Ready")) == len(wording.padded(wording.headline(state)))
    reading = State(settings, phase=RUNNING, stats={"now": {"tokens_per_second": None, "generated_tokens": 0}})
    assert wording.headline(reading) == "Reading the prompt" and wording.icon_text(reading) == "on"
    assert [wording.rate_text(rate) for rate in (0.423, 9.44, 9.96, 83.2, 5000.0)] == ["0.42", "9.4", "10", "83", "999"]


def test_choices_of_several_threads_leave_whole_settings(tmp_path: Path) -> None:
    controller = Controller(tmp_path / "settings")
    threads = [threading.Thread(target=controller.choose_budget, args=(10**9 + n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert controller.state.settings.budget in range(10**9, 10**9 + 8)
    assert read_settings(tmp_path / "settings") == controller.state.settings
    controller.close()
