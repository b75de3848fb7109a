"""The forecast of a model's speed: its arithmetic, its sentence, and the measured rate that is kept."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mixtures import make_mixture  # type: ignore[import-not-found]

from mlx_flash.flash import disk_rate as probe
from mlx_flash.flash.disk_rate import ReadTrial
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.unit_file import UnitFile
from mlx_flash.loading import forecast as module
from mlx_flash.loading.forecast import Forecast, Foresight
from mlx_flash.loading.in_place_loading import plan_in_place
from mlx_flash.loading.in_place_model import open_in_place
from mlx_flash.loading.layer_trial import TokenSeconds
from mlx_flash.loading.options import LoadOptions
from mlx_flash.loading.plan import ENDLESS
from mlx_flash.machine import kept_rates as kept_module
from mlx_flash.machine.kept_rates import LIFE_S, Rate, keep_rates, kept_rates
from mlx_flash.source.cached import DISK_RATES, entries


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            Forecast(16_200_000_000, 16.2 / 5.3, 0.1, 3.06, False),
            "forecast: every token reads 16.2 GB; this disk reads 5.3 GB/s: about 0.33 tokens per second",
        ),
        (
            Forecast(400_000_000, 0.2, 0.4, 0.5, True),
            "forecast: a token reads 0.4 GB if all experts are chosen equally often; this disk reads 2 GB/s: about 2 "
            "tokens per second, bound by computing",
        ),
        (
            Forecast(140_000_000_000, 20.0, 0.5, 20.1, False),
            "forecast: every token reads 140 GB; this disk reads 7 GB/s: about 20 seconds per token",
        ),
    ],
)
def test_the_sentence(made: Forecast, said: str) -> None:
    assert made.describe() == said


class Clock:
    """A clock that only moves when it is told to."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_what_is_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(1).bytes(1 << 20))
    batches = [np.array([[0, 4096, 1000], [0, 77, 2000]]), np.array([[0, 9000, 500_000]])]
    clock, reader = Clock(), Reader(4)
    monkeypatch.setattr(probe, "time", clock)
    try:
        with UnitFile(path) as file:
            trial = ReadTrial([file], reader, batches)
            waited, wait = [], reader.wait

            def slow(ticket: Any) -> Any:
                waited.append(ticket)
                clock.now += 0.2
                return wait(ticket)

            monkeypatch.setattr(reader, "wait", slow)
            # Half a second has room for three batches, and the fourth, which was begun, does not count.
            assert trial.rate(2) == pytest.approx((2 * 3000 + 500_000) / 0.6)
            assert len(waited) == 4 and reader.outstanding == 0
            waited.clear()
            monkeypatch.setattr(probe, "SECONDS", 1e9)
            ReadTrial([file], reader, batches).rate(1)
            assert len(waited) == probe.ROUNDS * len(batches), "a short file needs less time"
    finally:
        reader.close()


@pytest.mark.parametrize(("read_s", "exposed"), [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0), (3.0, 1.0)])
def test_how_much_does_not_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_s: float, exposed: float
) -> None:
    """A computation takes a second. A read that alone takes as long delays the end of both by `read_s`."""
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    clock, reader = Clock(), Reader(4)
    monkeypatch.setattr(probe, "time", clock)
    submitted: list[int] = []
    try:
        with UnitFile(path) as file:
            trial = ReadTrial([file], reader, [np.array([[0, 0, 3000], [0, 5000, 4000]])])
            wait, submit = reader.wait, reader.submit

            def compute() -> None:
                clock.now += 1

            def waited(ticket: Any) -> Any:
                clock.now += read_s / 2
                return wait(ticket)

            def noted(*given: Any, **named: Any) -> Any:
                submitted.append(int(given[3].sum()))
                return submit(*given, **named)

            monkeypatch.setattr(reader, "wait", waited)
            monkeypatch.setattr(reader, "submit", noted)
            assert trial.exposed_share(13_000, compute) == pytest.approx(exposed)
            assert submitted[:2] == [7000, 6000], "as much as is read in the seconds of the computation"
    finally:
        reader.close()


def test_a_measured_rate_is_kept_for_a_day(cache: Path) -> None:
    assert kept_rates() == {}
    keep_rates({"one": Rate(1e9, 0.25)})
    keep_rates({"other": Rate(2e9, 1.0)})
    assert kept_rates() == {"one": Rate(1e9, 0.25), "other": Rate(2e9, 1.0)}
    assert [entry.kind for entry in entries(cache)] == ["speed of disks", "bytes written per day"]
    kept = json.loads((cache / DISK_RATES).read_text())
    kept["one"][-1] = time.time() - LIFE_S - 1
    (cache / DISK_RATES).write_text(json.dumps(kept))
    assert kept_rates() == {"other": Rate(2e9, 1.0)}


@pytest.mark.parametrize("contents", ["", "[]", "{", '{"a": 1}', '{"a": [1, 2, "x"]}', "null", "[" * 5000])
def test_a_broken_file_of_rates(cache: Path, contents: str) -> None:
    cache.mkdir()
    (cache / DISK_RATES).write_text(contents)
    assert kept_rates() == {}
    keep_rates({"one": Rate(1e9, 0.25)})
    assert kept_rates() == {"one": Rate(1e9, 0.25)}


@pytest.mark.parametrize(
    "figures", ["[1" + 400 * "0" + ", 0", "[Infinity, 0", "[NaN, 0", "[1e-300, 0", "[-1, 0", "[1e9, NaN"]
)
def test_a_rate_that_is_none(cache: Path, figures: str) -> None:
    keep_rates({"good": Rate(1e9, 0.25)})
    kept = (cache / DISK_RATES).read_text()
    (cache / DISK_RATES).write_text(f'{{"bad": {figures}, {int(time.time())}], {kept[1:]}')
    assert kept_rates() == {"good": Rate(1e9, 0.25)}


def test_a_pipe_in_place_of_the_rates(cache: Path) -> None:
    cache.mkdir()
    os.mkfifo(cache / DISK_RATES)
    assert kept_rates() == {}
    keep_rates({"one": Rate(1e9, 0.25)})
    assert kept_rates() == {"one": Rate(1e9, 0.25)}


def test_a_folder_that_cannot_be_written_to(cache: Path) -> None:
    cache.write_text("a file where the folder would be")
    keep_rates({"one": Rate(1e9, 0.25)})
    assert kept_rates() == {}


@pytest.mark.parametrize(
    ("computed", "reads", "exposed", "seconds"),
    [
        ([5.0], [], 0.5, 5.0),
        ([1.0, 1.0, 1.0], [4.0, 4.0, 4.0], 0.0, 12.0),
        ([3.0, 1.0], [2.0, 2.0], 0.0, 5.0),  # not the longer of both sums, which are 4
        ([3.0, 1.0], [2.0, 2.0], 0.5, 6.5),
        ([3.0, 1.0], [2.0, 2.0], 1.0, 8.0),
        ([3.0, 1.0], [1.0, 2.0], 0.0, 4.0),  # the first computes while the second is read
    ],
)
def test_the_seconds_of_a_token(computed: list[float], reads: list[float], exposed: float, seconds: float) -> None:
    assert module._overlapped_s(computed, reads, exposed) == seconds


@pytest.mark.parametrize(
    ("streamed", "between"),
    [([], [1 + 2 + 4 + 8 + 100]), ([1], [115]), ([0, 2], [1 + 8 + 100, 2 + 4]), ([0, 1, 2, 3], [101, 2, 4, 8])],
)
def test_what_is_computed_between_two_waits(streamed: list[int], between: list[float]) -> None:
    class Layer:
        def __init__(self) -> None:
            self.module = object()

    layers: list[Any] = [Layer() for _ in range(4)]
    computing = TokenSeconds([(layer.module, float(2**n)) for n, layer in enumerate(layers)], 100.0)
    assert module._computed_between([layers[number] for number in streamed], computing) == between


@pytest.mark.parametrize(("family", "quantisation"), [("qwen3", "plain"), ("llama", "4 bits"), ("qwen3_moe", "plain")])
def test_the_forecast_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, quantisation: str
) -> None:
    monkeypatch.setattr(ReadTrial, "rate", lambda *_: 1e9)
    monkeypatch.setattr(ReadTrial, "exposed_share", lambda *_: 0.5)
    folder = make_mixture(
        tmp_path / "model", family, quantisation, hidden_size=256, intermediate_size=512, num_hidden_layers=4
    )
    mixture = open_in_place(folder)
    options = LoadOptions(memory=ENDLESS, context=64)
    plan, _, _, foresight = plan_in_place(folder, mixture, options)
    assert not foresight.reads(plan), "all of it is in memory"
    whole = foresight.of_token(plan)
    assert whole is not None and (whole.bytes_per_token, whole.read_s) == (0, 0.0) and whole.token_s == whole.compute_s
    of_layer = [sum(tensor.nbytes for tensor in layer.tensors) for layer in mixture.layers]
    change: dict[str, Any] = {"layer_bytes_per_token": sum(of_layer) - of_layer[2], "pinned": 1}
    if family == "qwen3_moe":
        change["expert_slots"] = (3, 6, 12, 12)  # of 12, of which a token names 4
    for name, value in change.items():
        object.__setattr__(plan, name, value)
    made = Foresight(mixture, lambda: 4, options).of_token(plan)
    assert made is not None and made.first_token_s is None
    missing = round(4 * (9 / 12 + 6 / 12) * mixture.expert_bytes) if family == "qwen3_moe" else 0
    assert made.bytes_per_token == change["layer_bytes_per_token"] + missing
    assert made.even is (family == "qwen3_moe") and made.disk_rate == pytest.approx(1e9)
    assert 0 < made.compute_s < made.token_s < made.compute_s + made.read_s
    assert {name.split(" of ")[0].split()[-1] for name in kept_module.kept_rates()} == {"layers", "experts"} - (
        set() if missing else {"experts"}
    )


def test_the_first_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt reads each layer once for the chunks that share it, and the experts that its tokens choose."""
    monkeypatch.setattr(ReadTrial, "rate", lambda *_: 1e6)
    monkeypatch.setattr(ReadTrial, "exposed_share", lambda *_: 1.0)
    monkeypatch.setattr(module, "prompt_seconds", lambda mixture, slots, tokens: 0.5 * tokens)
    folder = make_mixture(tmp_path / "model", "qwen3_moe", num_hidden_layers=2)
    mixture = open_in_place(folder)
    options = LoadOptions(memory=ENDLESS, context=600, prefill_chunk=200)
    plan, _, _, foresight = plan_in_place(folder, mixture, options)
    whole = foresight.of(plan)
    assert whole is not None and whole.first_token_s is not None and whole.prompt_tokens == module.PROMPT_TOKENS
    assert whole.first_token_s == pytest.approx(whole.token_s + 0.5 * 512), "nothing is read"
    object.__setattr__(plan, "expert_slots", (6, 12))  # of 12: one layer reads, and keeps half of them
    half = foresight.of(plan)
    assert half is not None and half.first_token_s is not None
    nbytes = 12 * (1 + 2 * 0.5) * mixture.expert_bytes  # in the first of three chunks all, then those without a slot
    assert half.first_token_s - half.token_s - 0.5 * 512 == pytest.approx(nbytes / 1e6, rel=0.01)
    assert "a token reads nothing: about" in whole.describe()


def test_a_plan_that_reads_more_is_never_forecast_as_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both plans compute alike, so a machine that is busy during the second forecast must not change their order."""
    trial, slower = module.token_seconds, iter((1.0, 10.0, 100.0))

    def busier(*arguments: Any) -> TokenSeconds:
        made, factor = trial(*arguments), next(slower)
        return TokenSeconds([(layer, factor) for layer, _ in made.layers], factor)

    monkeypatch.setattr(module, "token_seconds", busier)
    monkeypatch.setattr(ReadTrial, "rate", lambda *_: 1e9)
    folder = make_mixture(tmp_path / "model", "llama", num_hidden_layers=4)
    plan, _, _, foresight = plan_in_place(folder, open_in_place(folder), LoadOptions(memory=ENDLESS, context=64))
    found = []
    for nbytes in (10**6, 0):
        object.__setattr__(plan, "pinned", 4 if nbytes == 0 else 1)
        object.__setattr__(plan, "layer_bytes_per_token", nbytes)
        found.append(foresight.of_token(plan))
    assert found[0] is not None and found[1] is not None
    assert found[0].compute_s == found[1].compute_s and found[0].token_s > found[1].token_s


def test_a_model_whose_prompts_cannot_be_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> float:
        raise ValueError

    monkeypatch.setattr(module, "prompt_seconds", fails)
    folder = make_mixture(tmp_path / "model", "llama", num_hidden_layers=2)
    plan, _, _, foresight = plan_in_place(folder, open_in_place(folder), LoadOptions(memory=ENDLESS, context=64))
    made = foresight.of(plan)
    assert made is not None and made.first_token_s is None and made.tokens_per_second > 0
    monkeypatch.setattr(module, "token_seconds", fails)
    plan, _, _, foresight = plan_in_place(folder, open_in_place(folder), LoadOptions(memory=ENDLESS, context=64))
    assert foresight.of(plan) is None


def test_a_model_that_is_not_here_opens_none_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_mixture(tmp_path / "model", "llama", num_hidden_layers=4)
    plan, _, _, foresight = plan_in_place(folder, open_in_place(folder), LoadOptions(memory=ENDLESS, context=64))
    object.__setattr__(plan, "pinned", 1)
    object.__setattr__(plan, "layer_bytes_per_token", 10**6)
    monkeypatch.setattr(module, "RatesOfFiles", lambda *_: pytest.fail("its files were opened"))
    made = foresight.of_disk({(1 << 20, 1): 1e6, (1 << 20, 16): 2e6}).of(plan)
    assert made is not None and made.disk_rate > 0 and made.token_s == pytest.approx(made.compute_s + made.read_s)
