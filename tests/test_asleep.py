"""A machine that sleeps, and a process that is stopped, in the middle of an answer or of a measurement."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from kept_conversations import ask, fake, kept, prompt  # type: ignore[import-not-found]
from mixtures import make_mixture  # type: ignore[import-not-found]
from serving import until  # type: ignore[import-not-found]

from mlx_flash.flash.system import asleep_s
from mlx_flash.flash.undisturbed import GAP_S, Undisturbed
from mlx_flash.loading import unit_rates
from mlx_flash.loading.in_place_model import open_in_place
from mlx_flash.loading.options import LoadOptions
from mlx_flash.machine.kept_rates import kept_rates
from mlx_flash.text import conversation_files
from mlx_flash.text.draft_depth import LEAST_PASSES, DraftDepth, Pass

STOPPED_S = 3.0  # longer than the server's time until it unloads an idle model


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """(address, process id) of a server whose output goes to a full disk."""
    folder = make_mixture(tmp_path_factory.mktemp("asleep") / "model", "qwen3_moe")
    write_tokenizer(folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_flash.server", "--model", str(folder), "--port", str(port)]
    with open("/dev/full", "wb") as full:
        server = subprocess.Popen([*command, "--idle-unload", "2s", "--context", "512"], stdout=full, stderr=full)
    address = f"http://127.0.0.1:{port}"
    try:
        until(lambda: server.poll() is None and is_ready(address))
        yield address, server.pid
    finally:
        os.kill(server.pid, signal.SIGCONT)
        server.terminate()
        assert server.wait(60) == 0


def is_ready(address: str) -> bool:
    try:
        return bool(httpx.get(f"{address}/health").json()["status"] == "ok")
    except httpx.TransportError:
        return False


def streamed(address: str, during: Any = lambda: None) -> str:
    """The text of a streamed answer. during: called after its first piece."""
    body = {"prompt": "abc", "max_tokens": 80, "temperature": 0, "stream": True}
    text = ""
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=600) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                text += event["choices"][0]["text"] if event["choices"] else ""
                if text:
                    during()
                    during = lambda: None  # noqa: E731
    return text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_server_that_is_stopped_in_an_answer_goes_on_with_it(url: tuple[str, int]) -> None:
    address, process = url
    expected = streamed(address)
    meanwhile: list[str] = []

    def loads() -> int:
        return int(httpx.get(f"{address}/stats").json()["library"]["loads"])

    def sleep() -> None:
        before.append(loads())
        os.kill(process, signal.SIGSTOP)
        other = threading.Thread(target=lambda: meanwhile.append(streamed(address)))
        other.start()
        threads.append(other)
        time.sleep(STOPPED_S)
        os.kill(process, signal.SIGCONT)

    threads: list[threading.Thread] = []
    before: list[int] = []
    assert streamed(address, sleep) == expected
    threads[0].join(60)
    assert meanwhile == [expected], "a request that came meanwhile is answered"
    assert [loads()] == before, "the model was not unloaded in between"


# -- measurements --------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("jump", "slept", "held"), [(0.5, 0.0, True), (GAP_S, 0.0, False), (0.1, 8 * 3600.0, False)])
def test_a_measurement_notices_that_it_was_disturbed(jump: float, slept: float, held: bool) -> None:
    clock, asleep = Clock(), Clock()
    with Undisturbed(clock, asleep, beat_s=600) as span:
        clock.now += jump
        asleep.now += slept
    assert span.held is held


def test_the_beats_of_an_undisturbed_measurement() -> None:
    with Undisturbed(beat_s=0.001) as span:
        time.sleep(0.05)
    assert span.held and asleep_s() >= -0.1


@pytest.mark.parametrize("held", [True, False])
def test_a_rate_is_kept_only_if_it_was_not_disturbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    mixture = open_in_place(make_mixture(tmp_path / "model", "qwen3_moe"))
    if not held:
        ticks = iter(range(0, 10**6, 10))
        monkeypatch.setattr(unit_rates, "Undisturbed", lambda: Undisturbed(lambda: next(ticks)))
    disk = unit_rates.RatesOfFiles(mixture.files, LoadOptions())
    assert disk.rate("experts", [np.array([[0, 4096, 4096]])], 1).bytes_per_second > 0
    disk.close()
    assert bool(kept_rates()) is held


def test_a_pass_over_which_the_process_was_stopped_does_not_count() -> None:
    plain, drafted = [Pass(0, 0, 1.0, 0.0)] * (LEAST_PASSES + 1), [Pass(3, 3, 1.5, 0.0)] * (LEAST_PASSES + 1)
    depths = []
    for stopped in ([], [Pass(3, 0, 8 * 3600.0, 0.0)]):
        depth = DraftDepth()
        depth.record(0, plain)
        depth.record(3, [*drafted, *stopped])
        depths.append((depth.choose(), depth.rate(3)))
    assert depths[0] == depths[1] and depths[0][0] >= 3


def test_a_slow_write_is_forgotten(tmp_path: Path, endless: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk was waking up when a conversation was written to it."""
    notes: list[str] = []
    turns = kept(tmp_path, fake("trims"), notes)
    files = turns._files
    files._bytes_per_second, files._rated_at = 1.0, time.monotonic()
    ask(turns, endless, prompt(1, 40))
    ask(turns, endless, prompt(2, 40))
    assert len(notes) == 1 and "too slow" in notes[0] and not list(tmp_path.rglob("*.safetensors"))
    files._rated_at -= conversation_files.RATED_S + 1
    ask(turns, endless, prompt(3, 40))
    turns.close()
    assert list(tmp_path.rglob("*.safetensors"))
