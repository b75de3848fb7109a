"""The command `report`: its files, what they must not contain, its time limit, and what an interruption leaves."""

from __future__ import annotations

import argparse
import errno
import functools
import getpass
import json
import platform
import time
from collections.abc import Callable, Generator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]  # found beside this file
from mixtures import make_mixture  # type: ignore[import-not-found]
from test_doctor import MAC  # type: ignore[import-not-found]

from mlx_flash.cli.beginning import Interrupted
from mlx_flash.errors import BudgetError, FlashError, UsageError
from mlx_flash.flash.swap import SwapCounters
from mlx_flash.machine.hardware import hardware, versions
from mlx_flash.machine.memory_state import memory_state
from mlx_flash.machine.volumes import volume
from mlx_flash.report import __main__ as command
from mlx_flash.report import making, one_run, runs_apart
from mlx_flash.report.form import LOCAL, MachineReport, ReportedChoice, in_name, read_report
from mlx_flash.report.making import Making, Scope
from mlx_flash.report.measured_model import budgets, numbers_of, prompt_of, public_name, within
from mlx_flash.report.pasted import markdown
from mlx_flash.report.runs_apart import lines_of
from mlx_flash.report.same_tokens import compared

pytestmark = pytest.mark.usefixtures("one_processor")

Told = dict[str, Any]
EXAMINED: Told = {
    "model": {
        **{"name": "someone/Qwen3-30B-A3B-4bit", "model_type": "qwen3_moe", "numbers": {"bits": 4, "vocab_size": 99}},
        **{"units": "experts", "layers": 48, "units_per_layer": 128, "unit_bytes": 2654208},
        **{"resident_bytes": 10**9, "context": 640},
    },
    "budgets": [
        {"name": name, "bytes": size, "forecast_tokens_per_second": 7.5, "forecast_bytes_per_token": 10**9}
        for name, size in (("smallest", 3 * 10**9), ("middle", 9 * 10**9), ("largest", 15 * 10**9))
    ],
}
LOADED: Told = {"load_s": 0.0, "planned_bytes": 9 * 10**9, "slot_share": 0.5}
ANSWER: Told = {
    **{
        "ids": [5, 6, 7],
        "energy": "process CPU",
        "choices": {
            "lookahead": {"choice": False, "by": "trial", "trying": False},
            "threads": {"choice": 16, "by": "default", "trying": True},
            "io": {"choice": "buffered", "by": "you", "trying": False},
        },
        "generated_tokens": 128,
        "first_token_s": 1.25,
        "prompt_bytes": 10**9,
    },
    **{"tokens_per_second": 12.34, "token_median_s": 0.08, "token_p90_s": 0.1, "hit_rate": 0.9, "joules": 12.5},
    **{"bytes_per_token": 2e8, "reads_per_token": 80.0, "read_s": 0.03, "wait_s": 0.025, "manage_s": 0.001},
    **{"compute_s": 0.05, "peak_bytes": 8 * 10**9},
}


class Script:
    """Answers requests like the processes of the runs. `change` may change the lines of a run, or raise."""

    def __init__(self, change: Callable[[Told, list[Told]], object] = lambda *_: None) -> None:
        self.requests: list[Told] = []
        self._change = change

    def __call__(self, request: Told, seconds: float | None) -> Generator[Told]:
        if request["work"] == "examine":
            yield {"folder": "/Users/x/models/secret"}
            yield deepcopy(EXAMINED)
            return
        self.requests.append(request)
        lines = deepcopy([LOADED, {"state": "cold", **ANSWER}, {"state": "warm", **ANSWER}])
        error = self._change(request, lines)
        yield from lines
        if isinstance(error, BaseException):
            raise error


def made(script: Script, quick: bool = False) -> MachineReport:
    work = Making("someone/Qwen3-30B-A3B-4bit", quick, lambda _: None, lambda *_: MAC, script)
    work.make()
    report = work.report()
    assert report is not None
    return report


def test_every_prompt_within_every_budget() -> None:
    script = Script()
    report = made(script)
    asked = [(each["prompt_tokens"], each["memory"] // 10**9) for each in script.requests]
    assert asked == [(32, 9), (32, 3), (512, 9), (32, 15), (512, 3), (512, 15)]
    assert [(run.prompt_tokens, run.budget) for run in report.runs[:2]] == [(32, "middle"), (32, "smallest")]
    assert all([answer.state for answer in run.answers] == ["cold", "warm"] for run in report.runs)
    assert report.left_out == [] and report.energy == "process CPU" and report.tokens == 128
    assert report.runs[0].choices["threads"] == ReportedChoice(choice=16, by="default", trying=True)
    assert report.machine is not None and report.machine.hazards == ["swap_in_use"]
    text = markdown(report)
    assert "- Chosen by trials: lookahead off (middle, smallest, largest)\n" in text
    assert "**Apple M2**, 8 cores (4 + 4), 8 GPU cores, 8 GiB, macOS 26.1, MLX 0.32.4 on the GPU" in text
    row = "| middle, 9.00 GB | 50% | 32 | cold | 1.25 | 12.3 | 7.50 | 200 | 90% | 25.0 | 0.89 | 12.5 |"
    assert text.count(row) == 1 and text.count("\n| ") == 2 + 12
    named = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")][2:]
    assert [name.split(",")[0][2:] for name in named] == ["smallest"] * 4 + ["middle"] * 4 + ["largest"] * 4
    assert (
        "Same text, whatever the budget, cold and warm: **yes** (3 tokens of 6 answers to 32 tokens, budgets: 3;"
        in text
    )


def test_quick_has_one_short_prompt() -> None:
    script = Script()
    report = made(script, quick=True)
    assert {(each["prompt_tokens"], each["tokens"]) for each in script.requests} == {(32, 32)}
    assert len(report.runs) == 3 and report.quick and ", quick)" in markdown(report)


def test_a_short_context_has_shorter_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXAMINED["model"], "context", 512)
    script = Script()
    assert made(script).prompts == [32, 384]
    monkeypatch.setitem(EXAMINED["model"], "context", 100)
    with pytest.raises(UsageError, match="100 tokens"):
        made(script)


def test_another_text_is_told() -> None:
    def change(request: Told, lines: list[Told]) -> None:
        if request["memory"] == 15 * 10**9 and request["prompt_tokens"] == 512:
            lines[2]["ids"] = [5, 9, 7]

    report = made(Script(change))
    assert [each.same for each in report.same_text] == [True, False]
    assert report.same_text[1].first_difference == 1
    assert "**NO**" in markdown(report) and "different from token 1 on" in markdown(report)


def test_answers_that_were_cut_short_are_compared_as_far_as_they_go() -> None:
    found = compared([(32, "smallest", [1, 2, 3]), (512, "smallest", [4]), (32, "largest", [1, 2])])
    assert [(each.prompt_tokens, each.budgets, each.answers, each.tokens) for each in found] == [(32, 2, 2, 2)]


def test_when_the_time_is_over_the_later_runs_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def change(request: Told, _: list[Told]) -> None:
        assert request["answer_s"] == 37.5 and request["left_s"] == 590 - (clock[0] - 1000)
        clock[0] += 295.0

    report = made(Script(change))
    assert [(run.prompt_tokens, run.budget) for run in report.runs] == [(32, "middle"), (32, "smallest")]
    assert len(report.left_out) == 8 and {each.reason for each in report.left_out} == {"time"}
    assert "Left out (8 answers): 512 tokens, middle, time; 32 tokens, largest, time;" in markdown(report)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(TimeoutError(), "time"), (BudgetError("too small", 5), "memory"), (FlashError("odd"), "failed")],
)
def test_a_run_that_ends_early_leaves_its_answers(error: Exception, reason: str) -> None:
    def change(request: Told, lines: list[Told]) -> Exception | None:
        if (request["prompt_tokens"], request["memory"]) != (32, 3 * 10**9):
            return None
        del lines[2]
        return error

    report = made(Script(change))
    assert len(report.runs) == 6 and len(report.runs[1].answers) == 1
    (left,) = report.left_out
    assert (left.prompt_tokens, left.budget, left.state, left.reason) == (32, "smallest", "warm", reason)


def test_swap_is_counted_for_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = iter([SwapCounters(10**6, 0, 7), SwapCounters(3 * 10**6, 5 * 10**6, 7), *[SwapCounters()] * 10])
    monkeypatch.setattr(runs_apart, "swap_counters", lambda: next(counted))
    report = made(Script())
    moved = [(run.swapped_in_bytes, run.swapped_out_bytes, run.compressed_bytes) for run in report.runs[:2]]
    assert moved == [(2 * 10**6, 5 * 10**6, 0), (0, 0, 0)]
    assert "Swapped while a model ran: 2.0 MB in, 5.0 MB out\n" in markdown(report)


# -- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[Path], int]]:
    """Runs the command with a script and facts of the machine. Returns its files and its exit code."""

    def run(script: Any, facts: Told, *flags: str) -> tuple[list[Path], int]:
        monkeypatch.setattr("mlx_flash.machine.gathered.gathered", lambda *_: facts)
        monkeypatch.setattr(making, "Making", functools.partial(Making, lines=script))
        folder = tmp_path / "out"
        code = command.main(command.make_parser().parse_args(["--out", str(folder), *flags]))
        return sorted(folder.iterdir()), code

    return run


def test_the_files_and_the_list_of_what_they_contain(started: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (data, text), code = started(Script(), MAC)
    assert code == 0 and (data.suffix, text.suffix) == (".json", ".md") and data.stem == text.stem
    report = read_report(data)
    assert markdown(report) == text.read_text()
    out = capsys.readouterr().out
    assert text.read_text() in out and "They contain:" in out and "They do not contain:\n- names of users" in out


def test_ctrl_c_writes_what_there_is(started: Any, tmp_path: Path) -> None:
    def change(request: Told, lines: list[Told]) -> BaseException | None:
        if request["memory"] != 3 * 10**9:
            return None
        del lines[2]
        return Interrupted()

    with pytest.raises(KeyboardInterrupt):
        started(Script(change), MAC)
    (data,) = (tmp_path / "out").glob("*.json")
    report = read_report(data)
    assert [len(run.answers) for run in report.runs] == [2, 1]
    assert len(report.left_out) == 12 - 3 and {each.reason for each in report.left_out} == {"interrupted"}


def test_ctrl_c_before_there_is_anything(started: Any, tmp_path: Path) -> None:
    def at_once(request: Told, seconds: float | None) -> Generator[Told]:
        yield from ()
        raise Interrupted

    with pytest.raises(KeyboardInterrupt):
        started(at_once, MAC)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_at_the_end_leaves_the_printed_text(
    started: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mlx_flash.report.form.write_report", full)
    with pytest.raises(FlashError, match=r"cannot be written to .* \(No space left on device\)"):
        started(Script(), MAC)
    assert "Qwen3-30B-A3B-4bit" in capsys.readouterr().out


def test_no_run_at_all_is_a_failure(started: Any) -> None:
    def change(_: Told, lines: list[Told]) -> Exception:
        lines.clear()
        return BudgetError("too small", 5)

    _, code = started(Script(change), MAC)
    assert code == 1


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="Choose another --out"):
        command.main(argparse.Namespace(out=tmp_path / "file", model=None, quick=True))


# -- nothing personal --------------------------------------------------------------------------------------------


def test_nothing_personal_is_in_the_files(
    started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real run on a model in a folder with a telling name, with this machine's own facts and those of a Mac."""
    folder = make_mixture(tmp_path / "Erika Mustermann" / "my-secret-model", "qwen3_moe", moe_intermediate_size=512)
    write_tokenizer(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "_name_or_path": str(folder), "author": "Erika"}))
    for name in ("USER", "LOGNAME", "HOSTNAME"):
        monkeypatch.setenv(name, "erika-of-hamelin")
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "erika"))
    personal = [getpass.getuser(), platform.node(), str(Path.home()), str(Path.cwd()), "erika", "mustermann", "secret"]
    personal += [str(tmp_path), "/Users", "/home", "C02XL0GTJG5J", "serial", "Library", "LD_PRELOAD"]
    facts = deepcopy(MAC) | {"hardware": hardware(), "versions": versions(), "memory": memory_state()}
    facts["volume"] = volume(folder)
    facts["hardware"]["kernel"] = f"6.1-{platform.node()}"
    facts["hardware"]["serial_number"] = facts["cache"]["entries"][0]["name"] = "C02XL0GTJG5J"
    facts["environment"]["preloaded"] = ["LD_PRELOAD of erika"]
    facts["volume"]["unknown"] = {"external": f"{folder} is gone"}
    facts["findings"][0]["found"] = f"erika has {folder}"
    monkeypatch.setattr(making, "FULL", Scope((8, 24), 6, 60.0))
    files, code = started(lambda request, _: one_run.work(request), facts, "--model", str(folder))
    report = read_report(files[0])
    assert code == 0 and report.model.name == LOCAL and report.model.numbers["num_experts"] == 12
    assert [len(run.answers) for run in report.runs] == [2] * 2 * len(report.budgets) and len(report.budgets) == 3
    assert [(each.same, each.tokens) for each in report.same_text] == [(True, 6)] * 2
    shares = {run.budget: run.slot_share for run in report.runs}
    assert shares["smallest"] < 1 and shares["largest"] == 1
    for run in report.runs:
        assert all(answer.peak_bytes > 0 and (answer.tokens_per_second or 0) > 0 for answer in run.answers)
    for path in files:
        told = path.read_text()
        found = [word for word in personal if word.lower() in told.lower()]
        assert found == [] and folder.name not in told
    assert "/" not in files[0].read_text()  # so it holds no path at all


def test_names_of_models(tmp_path: Path) -> None:
    assert public_name("owner/name") == "owner/name"
    assert public_name(str(tmp_path)) == LOCAL and public_name(None) == "the packaged demo model"
    config = {
        "hidden_size": 64,
        "text_config": {"vocab_size": 9},
        "quantization": {"bits": 4, "mode": "x"},
        "author": 1,
    }
    assert in_name("Qwen3_MoE<b>") == "qwen3_moeb" and in_name("__") is None and in_name(3) is None
    assert numbers_of({**config, "num_experts": "many", "ffn_dim": 2**70}) == {
        "hidden_size": 64,
        "vocab_size": 9,
        "bits": 4,
    }


# -- the parts ---------------------------------------------------------------------------------------------------


def test_budgets() -> None:
    assert budgets(100, 300) == {"smallest": 100, "middle": 200, "largest": 300}
    assert budgets(1000, 1005) == {"smallest": 1000}


def test_a_process_that_is_a_little_larger_takes_a_little_more() -> None:
    def use(memory: int) -> int:
        if memory < 102:
            raise BudgetError("too small", 102)
        return memory

    assert within(100, use) == within(102, use) == 102
    with pytest.raises(BudgetError):
        within(50, use)


def test_the_prompt_has_as_many_tokens_as_asked() -> None:
    class Words:
        bos_token = None

        def encode(self, text: str, **_: Any) -> list[int]:
            return [len(word) for word in text.split()]

    assert len(prompt_of(Words(), 512)) == 512


def test_a_process_that_reports_an_error() -> None:
    with pytest.raises(UsageError, match="neither a folder nor"):
        list(lines_of({"work": "examine", "model": "/no/such", "context": 64}, 60))


def test_a_process_is_ended_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[Any] = []
    real = runs_apart.subprocess.Popen

    def begin(*given: Any, **options: Any) -> Any:
        began.append(real(*given, **options))
        return began[0]

    monkeypatch.setattr(runs_apart.subprocess, "Popen", begin)
    with pytest.raises(TimeoutError):
        list(lines_of({"work": "examine", "model": None, "context": 64}, 0.0))
    assert began[0].poll() is not None
