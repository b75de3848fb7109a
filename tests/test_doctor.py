"""The command `doctor`: what it prints of a machine, in words and in JSON, and its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from mlx_flash import doctor
from mlx_flash.cli.facts_view import WIDTH, examined
from mlx_flash.machine import gathered
from mlx_flash.machine.told import nothing

MAC: dict[str, Any] = {
    "hardware": {
        **{"system": "macOS", "system_version": "26.1", "chip": "Apple M2", "cores": 8, "memory_bytes": 8 << 30},
        **{"performance_cores": 4, "efficiency_cores": 4, "gpu_cores": 8, "virtual": False, "unknown": {}},
    },
    "versions": {"python": "3.12.7", "packages": {"mlx": "0.32.4", "mlx-vlm": None}, "unknown": {}},
    "environment": {"unmet": [], "unknown": {}},
    "memory": {
        **{"total_bytes": 8 << 30, "free_bytes": 3 << 30, "swap_used_bytes": 2 << 30, "pressure": "warning"},
        "unknown": {},
    },
    "power": {"battery_percent": 41, "plugged_in": False, "low_power": True, "heat": "nominal", "unknown": {}},
    "device": {"kind": "gpu", "recommended_bytes": 5726623061, "unknown": {}},
    "tests": {"shared_memory": True, "reader": True, "packed_products": True, "products": True, "unknown": {}},
    "volume": {
        **{"file_system": "apfs", "network": False, "external": True, "free_bytes": 90e9, "total_bytes": 494e9},
        "unknown": {},
    },
    "disk": {
        "rates": [
            {"piece_bytes": 16 << 10, "at_once": 1, "bytes_per_second": 90e6, "reads": 9},
            {"piece_bytes": 1 << 20, "at_once": 1, "bytes_per_second": 900e6, "reads": 9},
            {"piece_bytes": 16 << 10, "at_once": 16, "bytes_per_second": 700e6, "reads": 9},
        ],
        **{"direct": True, "cached_share": 0.0, "unknown": {}},
    },
    "cache": {
        **{"folder": "/Users/x/Library/Caches/mlx_flash", "total_bytes": 1.5e9, "entries": [{"kind": "store"}]},
        **{
            "conversations": 2,
            "written": {"today": {"downloads": 3e9, "checksums": 12345}, "most_per_day": {"conversations": 20e9}},
        },
        "unknown": {},
    },
    "trials": {
        "models": [
            {
                "about": {"model": "/models/mixture"},
                "same_machine": True,
                "budgets": {"2": {"trials": {"lookahead": {"choice": False}, "io": {"choice": "direct"}}}, "8": []},
            },
            {"about": {}, "same_machine": False, "budgets": {}},
        ],
        "unknown": {},
    },
    "findings": [
        {"name": "swap_in_use", "level": "note", "found": "2.1 GB are swapped out already", "do": "Close programs."}
    ],
}


def test_a_mac_in_words() -> None:
    text = examined(MAC)
    lines = text.splitlines()
    assert lines[:2] == [
        "machine    Apple M2, 8 cores (4 fast, 4 efficient), 8 GPU cores, 8.6 GB memory",
        "           macOS 26.1",
    ]
    assert "mlx 0.32.4, Python 3.12.7" in text and "mlx-vlm" not in text
    assert "GPU, which may use 5.7 GB" in text
    assert "battery at 41 %, not plugged in; power saving: on; heat: nominal" in text
    assert "apfs (external), 90.0 GB of 494.0 GB free" in text
    assert "               16 KiB       90      700" in lines and "                1 MiB      900" in lines
    assert "1.50 GB in /Users/x/Library/Caches/mlx_flash: 1 store, 2 kept conversations" in text
    assert "written to the disk today: 3.00 GB of downloads, 0.01 MB of checksums" in text
    assert lines[-7:-3] == [
        "trials     mixture",
        "           25% to 38% of it in memory: lookahead off, io direct",
        "           all of it in memory: nothing was chosen yet",
        "           None (from another version of MLX or another machine; not used)",
    ]
    assert lines[-2:] == [
        "note       2.1 GB are swapped out already. Close programs.",
        "result     no problems, 1 note",
    ]
    assert max(map(len, lines)) <= WIDTH


def test_a_machine_that_tells_nothing_in_words() -> None:
    facts = {name: nothing("no\x1bsuch") if name != "findings" else [] for name in MAC}
    text = examined(facts)
    assert "\x1b" not in text
    for name in ("machine", "software", "memory", "power", "disk", "self-tests", "cache", "trials"):
        assert any(line.startswith(f"{name:<11}") and "unknown (no" in line for line in text.splitlines()), name
    assert text.splitlines()[-1] == "result     no problems, no notes"


def test_a_class_of_budgets_that_no_run_writes() -> None:
    model = {"about": {"model": "x"}, "same_machine": True, "budgets": {"\u00b2": {}, "9" * 5000: {}}}
    assert "nothing was chosen yet" in examined({**MAC, "trials": {"models": [model]}})


def test_no_trials_yet() -> None:
    assert "trials     none yet; they are made while a model runs" in examined({**MAC, "trials": {"models": []}})


def test_a_disk_that_may_answer_from_memory() -> None:
    facts = deepcopy(MAC)
    facts["disk"]["direct"] = False
    assert "perhaps from memory" in examined(facts)
    facts["disk"].update(direct=True, cached_share=1.0)
    assert "perhaps from memory" in " ".join(examined(facts).split())


@pytest.mark.parametrize(("level", "code"), [("note", 0), ("problem", 1)])
def test_the_exit_code(level: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    facts = {**MAC, "findings": [{"name": "x", "level": level, "found": "it is", "do": "Do."}]}
    monkeypatch.setattr(gathered, "gathered", lambda folder: facts)
    arguments = doctor.make_parser().parse_args([])
    assert doctor.main(arguments) == code
    assert f"{level:<11}It is. Do.\n" in capsys.readouterr().out
    assert doctor.main(doctor.make_parser().parse_args(["--json"])) == code
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(facts))


def test_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: list[Path | None] = []
    monkeypatch.setattr(gathered, "gathered", lambda folder: asked.append(folder) or MAC)  # type: ignore[func-returns-value]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for model in (str(tmp_path), "none/such"):
        assert doctor.main(doctor.make_parser().parse_args(["--model", model])) == 0
    assert asked == [tmp_path, None]
    assert "none/such was not downloaded; `mlxflash plan --model none/such`" in capsys.readouterr().err


def test_the_command_itself(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(bytes(1 << 20))
    # The file is small, so that nothing large is written here.
    code = "import mlx_flash.machine.gathered as g; g.LEAST_BYTES = 1; from mlx_flash.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--model", str(model), "--json"],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
    )  # fmt: skip
    facts = json.loads(done.stdout)
    assert done.returncode == int(any(each["level"] == "problem" for each in facts["findings"])), done.stderr
    assert facts["disk"]["written_bytes"] == 0 and facts["disk"]["rates"]
    assert facts["tests"]["reader"] is True
