"""`mlxflash download`, and the plan of a repository before it is downloaded, from a local Hub."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Tiny, write_tokenizer  # type: ignore[import-not-found]
from hub_server import Hub, serve  # type: ignore[import-not-found]
from huggingface_hub import close_session
from mixtures import make_mixture  # type: ignore[import-not-found]
from test_hub import PIECE, contents, run_here  # type: ignore[import-not-found]
from tiny import make_checkpoint  # type: ignore[import-not-found]

from mlx_flash import plan
from mlx_flash.download import RATE_SECONDS, Meter
from mlx_flash.flash.files import Manifest
from mlx_flash.flash.safetensors_file import MAX_HEADER_BYTES
from mlx_flash.machine import disk_probe

REPOSITORY, WEIGHTS = "owner/model", "model.safetensors"

DOWNLOAD = """
import time
from mlx_flash.cli.run import run_command
from mlx_flash.download import main, make_parser
time.sleep = lambda _: None  # between tries
run_command(make_parser(), main)
"""
PLAN = """
from mlx_flash.cli.run import run_command
from mlx_flash.cli.show_plan import main, make_parser
run_command(make_parser(), main)
"""


@pytest.fixture(scope="module", autouse=True)
def close_connections() -> Iterator[None]:
    yield
    close_session()


@pytest.fixture(autouse=True)
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forecast measures the disk with a small file, and not for long."""
    monkeypatch.setattr(disk_probe, "OWN_BYTES", 32 << 20)
    monkeypatch.setattr(disk_probe, "SECONDS", 0.001)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = make_mixture(tmp_path_factory.mktemp("hub") / "mixture", "qwen3_moe")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint larger than two pieces of a download."""
    folder: Path = make_checkpoint(tmp_path_factory.mktemp("hub") / "big", hidden=256, neurons=2048, layers=4)
    return folder


def download(hub: Hub, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_here(DOWNLOAD, hub, home, REPOSITORY, *arguments, **environment)


def planned(hub: Hub, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_here(PLAN, hub, home, "--model", REPOSITORY, *arguments, **environment)


def lines_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# -- the plan before a download --------------------------------------------------------------------------------


def test_the_plan_is_that_of_the_downloaded_model(hub: Hub, home: Path, mixture: Path) -> None:
    """Nothing of the weights is fetched for it but their headers, and nothing is left behind."""
    hub.add(REPOSITORY, mixture)
    before = sorted(Path(tempfile.gettempdir()).glob("mlx_flash-skeleton-*"))
    (told,) = lines_of(planned(hub, home, "--json", "--context", "64", "--memory", "9GB"))
    here = plan(mixture, memory="9GB", context=64)
    assert told["resident_weights"] == here.demand.resident and told["slots"] == here.slots_bytes
    assert told["kv_cache"] == here.demand.kv_cache and told["context"] == here.context
    total = sum(path.stat().st_size for path in mixture.iterdir() if path.name != "README.md")
    assert told["download"]["bytes"] == told["download"]["missing_bytes"] == total
    assert told["download"]["free_bytes"] > 0
    size = (mixture / WEIGHTS).stat().st_size
    assert hub.fetched()[WEIGHTS] == [f"bytes=0-{min(size, 100_000) - 1}"]
    assert not (home / "hub").exists() or not list((home / "hub").rglob("blobs/*"))
    assert sorted(Path(tempfile.gettempdir()).glob("mlx_flash-skeleton-*")) == before

    done = planned(hub, home, "--context", "64")
    assert done.returncode == 0 and "of which" in done.stderr and "must be downloaded" in done.stderr
    assert "budgets, each with" in done.stdout and "tokens/s" in done.stdout
    done = planned(hub, home, "--memory", "1MB")
    assert done.returncode == 2 and "this model needs at least" in done.stderr

    lines_of(download(hub, home, "--json"))
    hub.requests.clear()
    (told,) = lines_of(planned(hub, home, "--json", "--context", "64"))
    assert "download" not in told and hub.requests == []


def test_the_forecast_of_a_model_that_is_not_here(
    hub: Hub, home: Path, mixture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes from headers and from the disk's speed, which is measured once."""
    hub.add(REPOSITORY, mixture)
    (told,) = lines_of(planned(hub, home, "--json", "--context", "64"))
    asked = hub.fetched()
    header = int.from_bytes((mixture / WEIGHTS).read_bytes()[:8], "little") + 8
    spans = [span.removeprefix("bytes=").split("-") for span in asked[WEIGHTS] if span is not None]
    assert len(spans) == len(asked[WEIGHTS]) and sum(int(end) + 1 - int(begin) for begin, end in spans) <= 100_000
    assert header < 100_000, "the header is in the first bytes, and no others were asked for"
    smallest = told["choices"][0]
    assert smallest["name"] == "smallest" and abs(smallest["budget"] - told["budgets"]["smallest"]) < 50 * 10**6
    for choice in told["choices"]:
        made = choice["forecast"]
        assert made["tokens_per_second"] > 0 and made["first_token_s"] > 0 and made["prompt_tokens"] == 64
        assert (made["bytes_per_token"] > 0) == (choice["in_memory"] != "everything")
    assert told["forecast"] == next(c["forecast"] for c in told["choices"] if c["name"] == "chosen")
    assert told["download"]["fits"] is True

    monkeypatch.setattr(disk_probe, "AT_ONCE", ())  # Nothing can be measured any more.
    done = planned(hub, home, "--context", "64", "--memory", "1GB")
    assert done.returncode == 0 and "measuring how fast the disk" not in done.stderr, done.stderr
    assert "forecast: " in done.stdout and "first token: after a prompt of 64 tokens" in done.stdout


def test_a_disk_that_cannot_be_measured(hub: Hub, home: Path, mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_probe, "SPARE_BYTES", 1 << 60)
    hub.add(REPOSITORY, mixture)
    done = planned(hub, home, "--context", "64")
    assert done.returncode == 0 and "there is no forecast, because the disk cannot be measured" in done.stderr
    assert "forecast: " not in done.stdout and "tokens/s" not in done.stdout and "budgets, each" in done.stdout


def test_a_long_header_is_read_in_two_requests(hub: Hub, home: Path, mixture: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("mlx_flash.source.skeleton.GUESS_BYTES", 64)
    hub.add(REPOSITORY, mixture)
    (told,) = lines_of(planned(hub, home, "--json", "--context", "64", "--memory", "9GB"))
    first, second = hub.fetched()[WEIGHTS]
    assert first == "bytes=0-63" and second is not None and second.startswith("bytes=64-")
    assert told["resident_weights"] == plan(mixture, memory="9GB", context=64).demand.resident


def test_a_server_without_ranges_sends_no_more_than_the_header(hub: Hub, home: Path, mixture: Path) -> None:
    hub.whole = True
    hub.add(REPOSITORY, mixture)
    lines_of(planned(hub, home, "--json", "--context", "64"))


def test_a_store_is_planned_as_well(hub: Hub, home: Path, store: Path) -> None:
    hub.add(REPOSITORY, store)
    (told,) = lines_of(planned(hub, home, "--json", "--context", "64"))
    assert told["predictors"] == plan(store, context=64).demand.predictors
    assert None not in hub.fetched()[Manifest.resident_file] and Manifest.neurons_file not in hub.fetched()


def test_a_relu_model_is_planned_after_its_conversion(hub: Hub, home: Path, tiny: Tiny) -> None:
    hub.add(REPOSITORY, tiny.checkpoint)
    done = planned(hub, home)
    assert done.returncode == 2 and f"{REPOSITORY} is a ReLU model: it runs after a conversion" in done.stderr


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({WEIGHTS: None}, 1, "has no weights: expected model"),
        ({WEIGHTS: None, "pytorch_model.bin": b"x" * 64}, 1, "has only PyTorch files, but this model is read in place"),
        ({"config.json": b'{"model_type": "nobody"}'}, 1, "is of model type 'nobody', which neither mlx_flash nor"),
        ({"config.json": b'{"model_type": "qwen3_moe", "model_file": "x.py"}'}, 1, "code from a checkpoint is never"),
        ({WEIGHTS: (1 << 62).to_bytes(8, "little") + b"{}"}, 1, f"claims {1 << 62} bytes, the file has 10. Nothing"),
        ({WEIGHTS: MAX_HEADER_BYTES.to_bytes(8, "little") + b" " * 99}, 1, "is not a valid safetensors file"),
        ({WEIGHTS: (2).to_bytes(8, "little") + b"{x" + b" " * 99}, 1, "its header is not valid JSON"),
    ],
    ids=["no weights", "torch", "type", "code", "huge header", "lying header", "no JSON"],
)
def test_why_a_repository_does_not_run(
    hub: Hub, home: Path, mixture: Path, change: dict[str, bytes | None], code: int, words: str
) -> None:
    hub.add(REPOSITORY, mixture)
    files = hub.repositories[REPOSITORY]["main"]
    for name, data in change.items():
        if data is None:
            del files[name]
        else:
            files[name] = data
    done = planned(hub, home)
    assert done.returncode == code and words in done.stderr, done.stderr
    assert REPOSITORY in done.stderr and "skeleton" not in done.stderr


@pytest.mark.parametrize("run", [planned, download], ids=["plan", "download"])
def test_what_the_hub_refuses(hub: Hub, home: Path, mixture: Path, run: Any) -> None:
    hub.add(REPOSITORY, mixture)
    hub.gated.add(REPOSITORY)
    done = run(hub, home)
    assert done.returncode == 2 and f"is gated. Accept its terms at {hub.address}/{REPOSITORY}" in done.stderr
    assert "`hf auth login`, or set HF_TOKEN" in done.stderr
    hub.private.add(REPOSITORY)
    done = run(hub, home)
    assert done.returncode == 2 and "If the repository is private, run `hf auth login`, or set HF_TOKEN" in done.stderr
    done = run(hub, home, "--revision", "v9")
    assert done.returncode == 2, done.stderr
    done = run(hub, home, HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "was not downloaded before, and HF_HUB_OFFLINE is set. Unset it" in done.stderr
    done = run(hub, home, HF_ENDPOINT="http://127.0.0.1:1")
    assert done.returncode == 1 and "the Hub cannot be reached" in done.stderr and "Are you online?" in done.stderr


# -- the download ----------------------------------------------------------------------------------------------


def test_progress_from_the_first_byte_to_the_folder(hub: Hub, home: Path, big: Path) -> None:
    hub.add(REPOSITORY, big, **{"README.md": b"#"})
    *told, last = lines_of(download(hub, home, "--json"))
    total = sum(path.stat().st_size for path in big.iterdir())
    assert told[0]["total"] == total and told[-1]["done"] == total
    assert contents(Path(last["folder"])) == contents(big)
    done = download(hub, home)
    assert done.returncode == 0 and done.stdout.startswith(last["folder"])
    assert f"mlxflash chat --model {REPOSITORY}" in done.stdout and "0.00 GB must be downloaded" in done.stderr


def test_a_broken_download_continues_and_one_can_be_discarded(hub: Hub, home: Path, big: Path) -> None:
    hub.add(REPOSITORY, big)
    hub.cut_at[WEIGHTS] = PIECE + PIECE // 2
    done = download(hub, home, "--json")
    assert done.returncode == 1 and "Run the same command again to continue" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["done"] >= PIECE
    (partial,) = home.rglob("*.incomplete")

    hub.cut_at.clear()
    hub.requests.clear()
    told = lines_of(download(hub, home, "--json"))
    assert told[0]["done"] >= PIECE and "folder" in told[-1]
    (span,) = hub.fetched()[WEIGHTS]
    assert span == f"bytes={PIECE}-"

    (home / "hub" / "models--owner--model" / "blobs" / "other.incomplete").write_bytes(b"x" * 1000)
    assert lines_of(download(hub, home, "--discard", "--json")) == [
        {"freed": 1000}
    ]  # What belongs to a snapshot stays.
    hub.requests.clear()
    lines_of(download(hub, home, "--json"))
    assert hub.fetched() == {} and not partial.exists()


def test_a_download_that_is_stopped_keeps_what_came_until_it_is_discarded(hub: Hub, home: Path, big: Path) -> None:
    hub.add(REPOSITORY, big)
    hub.stall_at[WEIGHTS] = PIECE + PIECE // 2
    command = [sys.executable, "-m", "mlx_flash.download", REPOSITORY, "--json", "--exit-with-stdin"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=hub.environment(home), stdin=pipe, stdout=pipe, stderr=pipe) as child:
        assert hub.stalled.wait(600) and child.stdout is not None and child.stdin is not None
        assert next(line for line in child.stdout if json.loads(line)["done"] >= PIECE)
        child.stdin.close()
        assert child.wait(600) != 0
        child.stdin = None
    (partial,) = home.rglob("*.incomplete")
    assert partial.stat().st_size == PIECE
    (told,) = lines_of(download(hub, home, "--discard", "--json"))
    assert told["freed"] >= PIECE and not list(home.rglob("*.incomplete"))


def test_too_little_room(hub: Hub, home: Path, big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPOSITORY, big)
    usage = SimpleNamespace(total=10**9, used=10**9, free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    done = download(hub, home)
    assert done.returncode == 1 and "where 0.00 GB are free. Make room" in done.stderr
    assert "has 0.00 GB free, which is too little" in done.stderr
    assert WEIGHTS not in hub.fetched()


def test_ctrl_c_says_what_is_kept(hub: Hub, home: Path, big: Path) -> None:
    hub.add(REPOSITORY, big)
    hub.stall_at[WEIGHTS] = PIECE
    command = [sys.executable, "-m", "mlx_flash.download", REPOSITORY]
    with subprocess.Popen(command, env=hub.environment(home), stderr=subprocess.PIPE, text=True) as child:
        assert hub.stalled.wait(600)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=600)
    assert child.returncode == 130 and "What has arrived is kept" in errors and "--discard" in errors


def test_the_meter() -> None:
    meter = Meter(1000)
    assert meter.look(100, 0.0) == (100, 1000, None, None)
    assert meter.look(300, 2.0) == (300, 1000, 100.0, 7.0)
    assert meter.look(300, 2.0 + RATE_SECONDS) == (300, 1000, 0.0, None)
    assert meter.look(1000, 4.0 + RATE_SECONDS).seconds_left == 0.0


def test_the_command_is_light() -> None:
    """It must not pay for a zoo."""
    program = "import sys, mlx_flash.download, mlx_flash.source.hub; print({'mlx_lm', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
