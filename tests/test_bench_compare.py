"""Naive, hybrid, dense and flash loading give the same logits and read the promised bytes. The comparisons run."""

import errno
import fcntl
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import psutil
import pytest
from slow_cases import slow  # type: ignore[import-not-found]

from mlx_flash.bench import steps, traces
from mlx_flash.bench.__main__ import make_parser
from mlx_flash.bench.baselines import contenders, matrices
from mlx_flash.bench.synthetic import neuron_store
from mlx_flash.bench.tools import cgroup, disk, figures, report, subprocess_json
from mlx_flash.errors import FlashError, ReadError, UsageError
from mlx_flash.flash.files import Manifest, read_manifest
from mlx_flash.flash.pool import AlignedPool
from mlx_flash.flash.reader import Reader
from mlx_flash.loading import load, streaming_needs

pytestmark = pytest.mark.usefixtures("one_processor")

IDS = [5, 9, 17, 33, 2, 60, 41, 7]
PROMPT = 3


@pytest.fixture(scope="module")
def tiny_synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "store"
    neuron_store.write_store(folder, (256, 3, 4), vocabulary=512)
    return folder


@pytest.fixture(scope="module")
def task_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], contenders.Task]:
    def make(store: Path) -> contenders.Task:
        path = tmp_path_factory.mktemp("matrices") / "matrices.bin"
        matrices.write_matrices(store, read_manifest(store).layout, path)
        return contenders.Task(str(store), IDS, PROMPT, str(path))

    return make


def logits_of(model: Any) -> np.ndarray:
    """Logits (T, vocabulary) of a prompt and of the tokens after it, one by one."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    rows = [np.array(model(mx.array([IDS[:PROMPT]]), cache=cache)[0])]
    rows += [np.array(model(mx.array([[token]]), cache=cache)[0]) for token in IDS[PROMPT:]]
    return np.concatenate(rows)


@pytest.mark.parametrize("name", ["synthetic", "bfloat16", "opt-350m-like", slow("float16"), slow("opt-nobias")])
def test_baselines_give_the_engine_s_logits(
    name: str,
    tiny_synthetic: Path,
    tiny_of: Callable[[str], Any],
    task_of: Callable[[Path], contenders.Task],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = tiny_synthetic if name == "synthetic" else tiny_of(name).store
    # Set this before the matrices are written, so that a matrix has several pieces.
    monkeypatch.setattr(matrices, "PIECE_BYTES", (64 if name == "synthetic" else 4) << 10)
    task = task_of(store)
    manifest = read_manifest(store)
    resident, streamed = manifest.files[Manifest.resident_file]["bytes"], manifest.layout.file_bytes
    held = (resident + 0.3 * streamed) / (resident + streamed)
    model, _ = load.load(store, predictor="none")
    expected = logits_of(model)
    model.flash.close()
    # These logits do not depend on the budget. The commands below ask for the smallest budget and load within it.
    monkeypatch.setattr(
        contenders, "_load_least", lambda folder, *_: load.load(folder, predictor="none", context=64)[0]
    )
    for contender in (
        contenders.Contender("naive"),
        contenders.Contender("hybrid", held=held),
        contenders.Contender("dense"),
    ):
        model = contenders._load_other_neurons(contender, task).model
        pieces = [(len(layer.mlp.resident), len(layer.mlp.pieces)) for layer in model.layers]
        resident, total = (sum(counts) for counts in zip(*pieces, strict=True))
        if contender.name == "hybrid":
            assert 0 < resident < total
        else:
            assert resident == (total if contender.name == "dense" else 0)
        np.testing.assert_allclose(logits_of(model), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        model.flash.close()


def test_naive_reads_every_matrix_for_every_token(
    tiny_synthetic: Path, task_of: Callable[[Path], contenders.Task]
) -> None:
    manifest = read_manifest(tiny_synthetic)
    result = contenders.run_here(contenders.Contender("naive"), task_of(tiny_synthetic))
    everything = manifest.files[Manifest.resident_file]["bytes"] + manifest.layout.file_bytes - result["weights_bytes"]
    for sample in result["samples"]:
        assert sample["bytes"] == pytest.approx(everything, rel=0.01)
    positions = 2050 * 256 * 4
    assert positions < result["weights_bytes"] < 1.1 * positions  # the positions, norms and biases stay in memory


def test_a_contender_runs_in_a_process_of_its_own(
    tiny_synthetic: Path, task_of: Callable[[Path], contenders.Task], capfd: pytest.CaptureFixture[str]
) -> None:
    task = task_of(tiny_synthetic)
    result = contenders.run(contenders.Contender("flash"), task)
    assert len(result["samples"]) == len(result["likeliest"]) == len(IDS) - PROMPT
    assert {"hits", "misses", "bytes", "reads", "read_s", "wait_s", "manage_s", "total_s"} <= set(result["samples"][0])
    assert result["peak_memory_bytes"] > result["weights_bytes"] > 0
    assert result["weights_bytes"] < result["plan"]["total"]
    with pytest.raises(UsageError, match="needs at least"):
        contenders.run(contenders.Contender("flash", memory=1), task)
    capfd.readouterr()
    with pytest.raises(FlashError, match="the contender nonsense ended with exit code"):
        contenders.run(contenders.Contender("nonsense", options={"nonsense": 1}), task)
    assert "nonsense" in capfd.readouterr().err


# -- figures -------------------------------------------------------------------------------------------------


def test_figures_add_up() -> None:
    sample = {"hits": 3, "misses": 1, "bytes": 4000, "reads": 2, "read_s": 2e-3, "wait_s": 5e-4, "manage_s": 1e-4}
    row = figures.figures([sample | {"total_s": 1e-3}, sample | {"total_s": 3e-3}])
    assert row["bytes_per_second"] == pytest.approx(2e6)
    assert (row["hidden_s"], row["hit_rate"]) == (pytest.approx(1.5e-3), 0.75)
    assert row["wait_s"] + row["manage_s"] + row["compute_s"] == pytest.approx(row["total_s"]) == 2e-3
    assert "total_s" not in figures.figures([sample])


def test_a_window_keeps_what_its_tokens_used() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((12, 30)) < 0.2
    for window in (0, 1, 4, 20):
        for t in range(len(mask)):
            before = set(np.flatnonzero(mask[max(0, t - window) : t].any(axis=0)))
            assert set(np.flatnonzero(steps.missing(mask, window)[t])) == set(np.flatnonzero(mask[t])) - before


def test_a_trace_has_a_row_for_every_token(tiny_synthetic: Path) -> None:
    model, _ = load.load(tiny_synthetic, context=64)
    history = traces.record(model, IDS, [2], "recording")
    model.flash.close()
    assert [trace.layer for trace in history] == [0, 1, 2]
    assert all(trace.chosen.shape == trace.active.shape == (len(IDS) + 1, 1024) for trace in history)


# -- commands ------------------------------------------------------------------------------------------------


@pytest.fixture
def command(
    tiny_synthetic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs a command in this process, whose size is made not to matter. Returns the last line."""
    monkeypatch.setattr(subprocess_json, "ask", lambda part, question, *_: contenders.respond(*question))
    monkeypatch.setattr(streaming_needs, "current_memory_bytes", lambda: 100_000_000)
    monkeypatch.setattr(disk, "RATE_BYTES", 3 << 20)

    def run(name: str, *flags: str) -> dict[str, Any]:
        given = [name, "--model", str(tiny_synthetic), "--output", str(tmp_path / "out"), "--no-cgroup", *flags]
        arguments = make_parser().parse_args(given)
        arguments.run(arguments)
        result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text()) == result
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
        assert result["synthetic"] and result["model"].startswith("synthetic")
        assert result["memory_limit"].startswith("not enforced")
        assert not list(tiny_synthetic.parent.glob("mlx_flash-matrices-*"))
        return result

    yield run


def test_naive_vs_flash(command: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    flags = ["--prompt", "4", "--tokens", "6", "--baseline-tokens", "3", "--rounds", "2"]
    result = command("naive-vs-flash", *flags, "--matrices", str(tmp_path / "kept"), "--force")
    rows = result["sides"]
    assert set(rows) == {"naive", "hybrid", "flash", "dense"}
    assert [rows[name]["tokens"] for name in rows] == [3, 3, 6, 6]
    assert rows["naive"]["bytes"] > rows["hybrid"]["bytes"] > rows["flash"]["bytes"] > 0 == rows["dense"]["bytes"]
    assert rows["hybrid"]["agreement"] == rows["dense"]["agreement"] == 1 and rows["flash"]["agreement_tokens"] == 3
    assert all(row["sequential_bytes_per_second"] > 0 and not row["killed"] for row in rows.values())
    [kept] = (tmp_path / "kept").iterdir()
    assert kept.stat().st_size == 3 * 2 * 1024 * 256 * 4  # layers, matrices, neurons, width, bytes


def test_steps(command: Callable[..., dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    result = command("steps", *["--prompt", "4", "--tokens", "6", "--baseline-tokens", "2"])
    rows = {row["step"]: row for row in result["steps"]}
    assert [row["kind"] for row in result["steps"]] == ["engine"] * 2 + ["replay"] * 3 + ["engine"] * 3
    assert rows["+ predictor"]["bytes"] > rows["+ windowing"]["bytes"]
    assert rows["+ predictor"]["reads"] > rows["+ windowing"]["reads"] > rows["+ bundling"]["reads"] > 0


def test_memory(command: Callable[..., dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    result = command("memory", *["--prompt", "4", "--tokens", "4", "--points", "3", "--force"])
    points = result["points"]
    assert len(points) == 3 and result["all_in_memory"]["bytes"] == 0
    budgets = [row["budget_bytes"] for row in points]
    assert budgets == sorted(budgets) and budgets[0] == result["smallest_bytes"]
    assert points[-1]["slot_share"] == 1 and points[0]["slot_share"] < 1
    assert all(math.isclose(row["tokens_per_second"], 1 / row["total_s"]) for row in points)


def test_prompts(command: Callable[..., dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    result = command("prompts", "--lengths", "10,20", "--rounds", "1")
    assert [row["length"] for row in result["rows"]] == [10, 20]
    for row in result["rows"]:
        assert math.isclose(row["ratio"], row["prompt_s"] / max(row["read_once_s"], row["compute_s"]))
        assert row["first_token_s"] > row["prompt_s"] > 0


def test_kept_matrices_are_whole_and_this_store_s(
    tiny_synthetic: Path, tiny_of: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(store: Path) -> Path:
        with matrices.kept_matrices(store, read_manifest(store), tmp_path / "kept") as path:
            return path

    def stop(layout: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(matrices, "rows_of_piece", stop)
        kept(tiny_synthetic)
    assert not list((tmp_path / "kept").iterdir())
    path = kept(tiny_synthetic)
    before = path.stat()
    assert kept(tiny_synthetic) == path and path.stat().st_mtime_ns == before.st_mtime_ns
    assert kept(tiny_of("float16").store) != path
    layout = read_manifest(tiny_synthetic).layout
    with path.with_name("more.partial").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another run is writing"):
            matrices.write_matrices(tiny_synthetic, layout, path.with_name("more"))
    cut = tmp_path / "cut"
    shutil.copytree(tiny_synthetic, cut)
    os.truncate(cut / Manifest.neurons_file, layout.layer_bytes + 4096)
    with pytest.raises(ReadError, match="within layer 1"):
        matrices.write_matrices(cut, layout, tmp_path / "matrices")
    assert not list(tmp_path.glob("matrices*"))


def test_baselines_are_for_opt_alone(tiny_synthetic: Path, tmp_path: Path) -> None:
    manifest = replace(read_manifest(tiny_synthetic), model_type="llama")
    opened = matrices.kept_matrices(tiny_synthetic, manifest, tmp_path)
    with pytest.raises(UsageError, match="only run OPT"), opened:
        pass


def test_a_small_file_is_read_in_sequence_with_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = disk.AlignedPool

    def pool(size: int) -> AlignedPool:
        sizes.append(size)
        return real(size)

    monkeypatch.setattr(disk, "AlignedPool", pool)
    paths = [tmp_path / "small", tmp_path / "larger"]
    for path, size in zip(paths, (10, 9000), strict=True):
        path.write_bytes(bytes(size))
    assert disk.sequential_rate(paths)["bytes"] == 9010
    assert disk.sequential_rate(paths, 4097)["bytes"] == 4107
    monkeypatch.setattr(disk, "PIECE_BYTES", 4096)
    assert disk.sequential_rate(paths)["bytes"] == 9010
    paths[0].write_bytes(b"")
    assert disk.sequential_rate(paths[:1])["bytes"] == 0
    assert sizes == [12288, 12288, 8192, 8192, 4096, 4096, 4096, 4096]


def test_results_are_not_lost_where_they_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = pytest.importorskip("matplotlib.figure")

    def full(self: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(figure.Figure, "savefig", full)
    result = {"environment": report.environment(tmp_path)}
    with pytest.raises(FlashError, match="No space left"):
        report.finish(tmp_path, "name", result, lambda figure: None, show=lambda: print("a table"))
    assert [path.name for path in tmp_path.iterdir()] == ["name.json"]
    table, written, last = capsys.readouterr().out.splitlines()
    assert (table, written) == ("a table", f"not written: {tmp_path / 'name'}.png")
    assert json.loads(last) == json.loads((tmp_path / "name.json").read_text()) == {"command": "name", **result}


def test_an_interrupted_child_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"]
    command[-1] += "; time.sleep(60)"

    def interrupt() -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGINT)  # the child leaves Ctrl-C to its parent
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        cgroup.run_child(command)
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_host(tiny_synthetic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    submit = Reader.submit
    arguments = make_parser().parse_args(["host", "--model", str(tiny_synthetic), "--tokens", "4"])
    arguments.run(arguments)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert Reader.submit is submit
    arguments.tokens = 2000
    with pytest.raises(UsageError, match="2048 positions"):
        arguments.run(arguments)
    assert 0 < result["manage_share"] < 1
    assert 0 < result["ms_per_token"]["mark_used"] < result["ms_per_token"]["take_stored"] < result["total_ms"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["prompts", "--lengths", "32,x"], "--lengths"),
        (["prompts", "--lengths", "513"], "9 to 512"),
        (["naive-vs-flash", "--share", "0.01"], "leave it out"),
        (["naive-vs-flash", "--tokens", "2", "--rounds", "3"], "--rounds"),
        (["naive-vs-flash", "--tokens", "5000"], "positions"),
        (["memory", "--text", "/nowhere/text"], "cannot read --text"),
    ],
)
def test_what_cannot_be_is_refused(flags: list[str], message: str, command: Callable[..., dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match=message):
        command(*flags)


def test_a_quantised_store_is_refused(tiny_of: Callable[[str], Any], command: Callable[..., dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match="is quantised, which the baselines do not read"):
        command("naive-vs-flash", "--model", str(tiny_of("4 bits").store))


@pytest.mark.parametrize(
    "flags",
    [
        ["naive-vs-flash", "--share", "0"],
        ["steps", "--share", "x"],
        ["memory", "--points", "1"],
        ["steps", "--rounds", "2"],
        ["steps", "--output", __file__],
        ["memory", "--matrices", f"{__file__}/folder"],
        ["synthetic", "--output", f"{__file__}/folder"],
        ["random-checkpoint", "--output", __file__],
        ["random-checkpoint", "--output", "nowhere", "--seed", "-1"],
    ],
)
def test_wrong_flags(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        make_parser().parse_args(flags)
    assert raised.value.code == 2
