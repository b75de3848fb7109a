"""The form of a machine report: what is refused, what is shown of hostile texts, energy, the page, the issue form."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from pydantic import ValidationError
from test_doctor import MAC  # type: ignore[import-not-found]  # found beside this file
from test_report import Script, made  # type: ignore[import-not-found]

from mlx_flash.bench import machines
from mlx_flash.errors import UsageError
from mlx_flash.report import energy
from mlx_flash.report.energy import EnergyMeter
from mlx_flash.report.form import MOST_FILE_BYTES, in_words, read_report, write_report
from mlx_flash.report.machine_facts import machine_of
from mlx_flash.report.pasted import escaped

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"


@pytest.fixture(scope="module")
def sound() -> dict[str, Any]:
    found: dict[str, Any] = made(Script()).model_dump()
    return found


def changed(sound: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> str:
    found = json.loads(json.dumps(sound))
    change(found)
    return json.dumps(found)


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "an unknown field": lambda r: r.update(home="x"),
    "a path as a chip": lambda r: r["machine"].update(chip="/Users/x"),
    "a link as a chip": lambda r: r["machine"].update(chip="[x](http://x)"),
    "a line break": lambda r: r["machine"].update(chip="M4\n# x"),
    "a column": lambda r: r["machine"].update(file_system="apfs | x"),
    "a long text": lambda r: r["machine"].update(chip="M" * 81),
    "a text as a number": lambda r: r["machine"].update(cores="8"),
    "a negative number": lambda r: r["machine"].update(cores=-8),
    "a name with two slashes": lambda r: r["model"].update(name="a/b/c"),
    "HTML as a name": lambda r: r["model"].update(name="a/<img>"),
    "a hostile hazard": lambda r: r["machine"].update(hazards=["@everyone"]),
    "many hazards": lambda r: r["machine"].update(hazards=["x"] * 41),
    "many runs": lambda r: r.update(runs=r["runs"] * 2),
    "a run in no budget": lambda r: r.update(budgets=r["budgets"][:1]),
    "a budget twice": lambda r: r.update(budgets=[*r["budgets"][:2], r["budgets"][0]]),
    "no answers": lambda r: r["runs"][0].update(answers=[]),
    "not a day": lambda r: r.update(made="yesterday"),
    "infinity": lambda r: r["runs"][0].update(load_s=float("inf")),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_what_is_out_of_bounds_is_refused(
    change: Callable[[dict[str, Any]], object], sound: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "x.json"
    path.write_text(changed(sound, lambda _: None))
    assert read_report(path).model_dump() == sound
    path.write_text(changed(sound, change))
    with pytest.raises(UsageError, match=r"'x.json' is not a machine report") as refused:
        read_report(path)
    assert "\n" not in str(refused.value) and "http" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is not a machine report"),
        ("[" * 50_000, "is not a machine report"),
        ("[]", "is not a machine report"),
        ('{"format": "another"}', "is not a machine report"),
        ('{"format": "mlx_flash machine report", "schema_version": 2}', "has the schema version 2, expected 1"),
        ('{"format": "mlx_flash machine report", "schema_version": true}', "has the schema version True"),
        ('{"format": "mlx_flash machine report"}', "has the schema version None"),
        (" " * (MOST_FILE_BYTES + 1), "has more than 256 KiB"),
    ],
)
def test_other_files_and_other_versions_are_refused(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=says):
        read_report(path)
    with pytest.raises(UsageError, match=says):
        machines.read_all(tmp_path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_report(tmp_path / "missing.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UsageError, match="is not a file"):
        read_report(tmp_path / "pipe.json")


def test_a_file_is_never_half_written(sound: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = made(Script())

    def full(_: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_report(report, tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


PARSER = MarkdownIt("commonmark").enable("table")


@given(st.text(string.punctuation + "aw1 \n\u00e4"))
def test_markdown_shows_a_text_as_it_is(text: str) -> None:
    """It is one cell of a table, without any element, and has the characters of the text."""
    tokens = PARSER.parse(f"| a |\n| --- |\n| x{escaped(text)} |\n")
    heading, cell = [token for token in tokens if token.type == "inline"]
    children = cell.children or []
    assert heading.content == "a" and {child.type for child in children} <= {"text", "text_special"}
    assert "".join(child.content for child in children) == f"x{' '.join(text.split())}".strip()


def test_words() -> None:
    assert in_words("Intel(R) Xeon(R) CPU @ 2.20GHz") == "Intel(R) Xeon(R) CPU at 2.20GHz"
    assert in_words("Debian GNU/Linux 12 (bookworm)") == "Debian GNU Linux 12 (bookworm)"
    assert in_words("/Users/x|<b>\n") == "Users xb" and in_words("🙂") is None and in_words(5) is None
    assert len(in_words("x" * 200) or "") == 80


def test_odd_facts_are_left_out() -> None:
    odd = {
        **MAC,
        "hardware": {"chip": ["M4"], "cores": -1, "memory_bytes": "8 GB", "system": "macOS"},
        "power": {"heat": "very / hot"},
        "tests": {"unknown": {"everything": "it ended"}},
        "disk": {"unknown": {"everything": "no disk"}},
        "findings": [],
    }
    machine = machine_of(odd)
    assert (machine.chip, machine.cores, machine.memory_bytes, machine.heat) == (None, None, None, None)
    assert machine.system == "macOS" and machine.disk == [] and machine.self_tests == {}
    assert machine_of({"findings": []}).model_dump(exclude_defaults=True) == {}
    with pytest.raises(ValidationError):
        machine.model_validate({"chip": "a/b"})


# -- energy ------------------------------------------------------------------------------------------------------


def write_zone(powercap: Path, name: str, microjoules: int | str) -> None:
    (powercap / name).mkdir(parents=True, exist_ok=True)
    (powercap / name / "energy_uj").write_text(f"{microjoules}\n")
    (powercap / name / "max_energy_range_uj").write_text("1000000\n")


def test_energy_of_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert EnergyMeter(tmp_path).read() == ("not available", None)
    write_zone(tmp_path, "intel-rapl:0", 999_000)
    write_zone(tmp_path, "intel-rapl:0:0", 5)
    write_zone(tmp_path, "intel-rapl:1", 100)
    meter = EnergyMeter(tmp_path)
    assert meter.read() == ("not available", None)
    write_zone(tmp_path, "intel-rapl:0", 1_000)  # It began again.
    write_zone(tmp_path, "intel-rapl:1", 5_100)
    assert meter.read() == ("processor packages", 0.007)
    write_zone(tmp_path, "intel-rapl:1", "denied")
    assert meter.read() == ("not available", None)


def test_energy_of_a_process_on_macos(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the 41st number after the identity; `ri_penergy_nj` follows it."""
    used = [7_000_000_000]

    class Library:
        def proc_pid_rusage(self, _pid: int, flavor: int, words: Any) -> int:
            assert flavor == 6 and ctypes.sizeof(words) == 16 + 8 * 56
            words[2 + 40], words[2 + 41] = used[0], 1
            return 0

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(energy.ctypes, "CDLL", lambda _: Library())
    meter = EnergyMeter()
    used[0] += 2_500_000_000
    assert meter.read() == ("process CPU", 2.5)
    assert EnergyMeter().read() == ("not available", None)  # a machine that leaves the counter as it is


# -- the page and the form ---------------------------------------------------------------------------------------


def test_the_page_is_made_of_the_files_in_the_repository() -> None:
    """If this fails, run `mlxflash bench machines bench/results/machines`."""
    reports = machines.read_all(RESULTS / "machines")
    assert reports and (RESULTS / "machines.md").read_text() == machines.page(reports, "machines")


def test_the_page(sound: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "machines"
    folder.mkdir()
    (folder / "mac-m2.json").write_text(json.dumps(sound))
    without = changed(sound, lambda r: r.update(machine=None, runs=r["runs"][:1], same_text=[]))
    (folder / "other.json").write_text(without)
    machines.main(argparse.Namespace(folder=folder))
    text = (tmp_path / "machines.md").read_text()
    assert (
        "Reports: **2**, from Macs: **1**." in text
        and "## macOS / GPU: Apple M2\n" in text
        and "[mac-m2.json](machines/mac-m2.json)" in text
    )
    assert "| 9.00 GB | 50% | 12.3 | 12.3 | 7.50 | 1.25 | 1.25 | 200 | 90% | 0.89 |" in text
    assert "not compared" in text and text.count("| 9.00 GB") == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["macs"] == 1
    (folder / "Odd name.json").write_text(json.dumps(sound))
    with pytest.raises(UsageError, match="Rename it"):
        machines.main(argparse.Namespace(folder=folder))
    with pytest.raises(UsageError, match="there is no folder"):
        machines.main(argparse.Namespace(folder=tmp_path / "none"))


def test_the_issue_form_takes_both_files() -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "machine-report.yml").read_text())
    assert {"name", "description", "body"} <= form.keys()
    fields = {field["id"]: field for field in form["body"] if "id" in field}
    assert {field["type"] for field in form["body"]} <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    assert all(fields[name]["validations"]["required"] for name in ("text", "json"))
    assert fields["json"]["attributes"]["render"] == "json"
    assert form["name"] in (ROOT / "mlx_flash" / "report" / "__main__.py").read_text()
