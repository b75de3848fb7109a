"""Conversion stores the right rows, gives the same bytes every time, and loses nothing when interrupted."""

from __future__ import annotations

import errno
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from children_setup import set_numpy_threads  # type: ignore[import-not-found]
from filelock import FileLock, Timeout
from tiny import make_checkpoint  # type: ignore[import-not-found]

from mlx_flash.check import check_store, unlisted_files
from mlx_flash.cli.run import run_command
from mlx_flash.convert import __main__ as command
from mlx_flash.convert import numpy_matrix
from mlx_flash.convert.checkpoint import Checkpoint
from mlx_flash.convert.conversion import Settings, convert
from mlx_flash.errors import CheckpointError, ConversionError, NoSpaceError, UsageError
from mlx_flash.flash.files import MANIFEST, Manifest, read_manifest
from mlx_flash.flash.safetensors_file import read_header

pytestmark = pytest.mark.usefixtures("one_processor")

QUICK = Settings(calibration_tokens=64)
Cli = Callable[..., tuple[int, str]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors_of(path: Path) -> dict[str, mx.array]:
    arrays: Any = mx.load(str(path))
    mx.eval(arrays)
    return arrays


def rows_of(store: Path) -> np.ndarray:
    """The stored bytes, read by the format's rules: uint8 (layers, parts, neurons, row bytes)."""
    layout = read_manifest(store).layout
    raw = (store / Manifest.neurons_file).read_bytes()
    rows = np.empty((layout.layers, len(layout.parts), layout.neurons, layout.row_bytes), np.uint8)
    for layer, part, neuron in np.ndindex(rows.shape[:3]):
        block, lane = divmod(neuron, layout.neurons_per_block)
        begin = layer * layout.layer_bytes + block * layout.block_bytes
        begin += (part * layout.neurons_per_block + lane) * layout.row_bytes
        rows[layer, part, neuron] = np.frombuffer(raw, np.uint8, layout.row_bytes, begin)
    return rows


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", neurons=128)


@pytest.fixture
def own_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def reference(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of an undisturbed conversion of `checkpoint`."""
    folder = tmp_path_factory.mktemp("reference") / "store"
    convert(checkpoint, folder, QUICK)
    assert check_store(folder) == [] and unlisted_files(folder) == []
    return contents(folder)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command line in this process. Returns (exit code, stderr)."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["convert", "--calibration-tokens", "64", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            run_command(command.make_parser(), command.main)
        return int(exit.value.code or 0), capsys.readouterr().err

    return run


# -- stored contents -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_stored_rows_are_the_rows_and_columns(tmp_path: Path, dtype: mx.Dtype) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", hidden=36, neurons=67, dtype=dtype)
    manifest = convert(folder, tmp_path / "store", QUICK)
    weights = tensors_of(folder / "model.safetensors")
    rows = rows_of(tmp_path / "store")
    for layer in range(manifest.layout.layers):
        prefix = f"model.decoder.layers.{layer}."
        up, down = weights[prefix + "fc1.weight"], weights[prefix + "fc2.weight"]
        assert (rows[layer, 0] == np.array(up.view(mx.uint8))).all()
        assert (rows[layer, 1] == np.array(mx.contiguous(down.T).view(mx.uint8))).all()
    stored = tensors_of(tmp_path / "store" / Manifest.resident_file)
    assert not any("fc1" in name or "fc2" in name for name in stored)
    bias = weights["model.decoder.layers.1.fc1.bias"]
    assert mx.array_equal(stored["model.decoder.layers.1.mlp.up_bias"], bias).item()
    assert len(stored) == len(weights) - 2 * manifest.layout.layers
    assert manifest.default_predictor == "lowrank"  # 67 neurons do not divide into the shadow's groups
    assert check_store(tmp_path / "store") == []


def test_same_bytes_from_another_folder_and_under_any_name(
    checkpoint: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "elsewhere")
    os.utime(tmp_path / "elsewhere" / "model.safetensors", (1, 1))
    convert(tmp_path / "elsewhere", tmp_path / "renamed", QUICK)
    assert contents(tmp_path / "renamed") == reference
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "renamed"]  # no other file is left


def test_same_bytes_every_time_with_several_threads(checkpoint: Path, tmp_path: Path) -> None:
    """Users convert with several threads; the other tests use one."""
    set_numpy_threads(os.cpu_count() or 1)
    try:
        stores = [convert(checkpoint, tmp_path / name, QUICK) and contents(tmp_path / name) for name in ("1", "2")]
    finally:
        set_numpy_threads(1)
    assert stores[0] == stores[1]


def test_dtype_option_casts_everything(checkpoint: Path, tmp_path: Path) -> None:
    manifest = convert(checkpoint, tmp_path / "store", Settings("float16", calibration_tokens=64))
    weights = tensors_of(checkpoint / "model.safetensors")
    assert manifest.layout.dtype == manifest.resident_dtype == "float16"
    up = weights["model.decoder.layers.0.fc1.weight"].astype(mx.float16)
    assert (rows_of(tmp_path / "store")[0, 0] == np.array(up.view(mx.uint8))).all()
    assert {a.dtype for a in tensors_of(tmp_path / "store" / Manifest.resident_file).values()} == {mx.float16}


def shard(folder: Path) -> None:
    weights = sorted(tensors_of(folder / "model.safetensors").items())
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    half = len(weights) // 2
    for name, part in zip(names, (weights[:half], weights[half:]), strict=True):
        mx.save_safetensors(str(folder / name), dict(part))
    index = {name: names[i >= half] for i, (name, _) in enumerate(weights)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def without_source(files: dict[str, bytes]) -> dict[str, Any]:
    """Drops the manifest's source fields, the only difference if the same weights are in other checkpoint files."""
    manifest = json.loads(files[MANIFEST])
    del manifest["source"], manifest["checksum"]
    return {**files, MANIFEST: manifest}


def test_shards_give_the_same_store(own_checkpoint: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    shard(own_checkpoint)
    convert(own_checkpoint, tmp_path / "store", QUICK)
    assert without_source(contents(tmp_path / "store")) == without_source(reference)


def test_a_copy_of_tied_embeddings_is_left_out(
    own_checkpoint: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    weights = tensors_of(own_checkpoint / "model.safetensors")
    weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"]
    mx.save_safetensors(str(own_checkpoint / "model.safetensors"), weights)
    convert(own_checkpoint, tmp_path / "store", QUICK)
    assert without_source(contents(tmp_path / "store")) == without_source(reference)


def test_names_without_model_prefix_give_the_same_store(
    own_checkpoint: Path, reference: dict[str, bytes], tmp_path: Path
) -> None:
    weights = tensors_of(own_checkpoint / "model.safetensors")
    renamed = {name.removeprefix("model."): weight for name, weight in weights.items()}
    mx.save_safetensors(str(own_checkpoint / "model.safetensors"), renamed)
    convert(own_checkpoint, tmp_path / "store", QUICK)
    assert without_source(contents(tmp_path / "store")) == without_source(reference)


def test_torch_files_give_the_same_store(own_checkpoint: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    weights = tensors_of(own_checkpoint / "model.safetensors")
    path = own_checkpoint / "pytorch_model.bin"
    torch.save({name: torch.from_numpy(np.array(weight)) for name, weight in weights.items()}, path)
    (own_checkpoint / "model.safetensors").unlink()
    convert(own_checkpoint, tmp_path / "store", QUICK)
    assert without_source(contents(tmp_path / "store")) == without_source(reference)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read by torch"):
        convert(own_checkpoint, tmp_path / "other", QUICK)
    torch.save([1], path)
    with pytest.raises(CheckpointError, match="does not hold named tensors"):
        convert(own_checkpoint, tmp_path / "other", QUICK)
    torch.save({"a": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"format of PyTorch before 1\.6.*newer torch"):
        convert(own_checkpoint, tmp_path / "other", QUICK)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_shards_with_tied_embeddings_give_the_same_store(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    folder = make_checkpoint(tmp_path / "checkpoint", neurons=128, dtype=getattr(mx, dtype))
    convert(folder, tmp_path / "reference", QUICK)
    weights = {
        name: torch.from_numpy(np.array(weight.astype(mx.float32))).to(getattr(torch, dtype))
        for name, weight in tensors_of(folder / "model.safetensors").items()
    }
    (folder / "model.safetensors").unlink()
    weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"]  # one storage, two names
    names = sorted(weights)
    index: dict[str, str] = {}
    for number, part in enumerate((names[:12], names[12:]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    torch.save({"optimizer": torch.zeros(9)}, folder / "pytorch_model-old.bin")  # not named in the index
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    manifest = convert(folder, tmp_path / "store", QUICK)
    assert manifest.layout.dtype == dtype
    assert without_source(contents(tmp_path / "store")) == without_source(contents(tmp_path / "reference"))


class Malicious:
    """When unpickled, this calls os.mkdir."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_a_torch_file_that_would_run_code_is_refused(own_checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    torch = pytest.importorskip("torch")
    (own_checkpoint / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(3), "x": Malicious(tmp_path / "run")}, own_checkpoint / "pytorch_model.bin")
    code, err = cli("--model", own_checkpoint, "--output", tmp_path / "store")
    assert code == 1 and "reading it would call posix.mkdir, which was not done" in err, err
    assert "Traceback" not in err and "weights_only" not in err
    assert not (tmp_path / "run").exists()


def test_memory_follows_the_largest_layer_not_the_model(tmp_path: Path) -> None:
    peaks = []
    for layers in (2, 6):
        folder = make_checkpoint(tmp_path / f"checkpoint-{layers}", hidden=128, neurons=1024, layers=layers)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        convert(folder, tmp_path / f"store-{layers}", QUICK)
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[0] > 0
    assert peaks[1] < 1.2 * peaks[0]


def test_an_embedding_larger_than_the_layers_is_never_in_memory_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numpy_matrix, "PIECE_BYTES", 1 << 19)
    # The embedding has 26 MB, a layer 0.1 MB. Perplexity reads the whole embedding for every measured position.
    folder = make_checkpoint(tmp_path / "checkpoint", neurons=128, vocab=100_000, positions=16)
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    tracemalloc.start()
    try:
        convert(folder, tmp_path / "store", QUICK)
        on_host = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert on_host + mx.get_peak_memory() - before < 15e6
    stored, given = (tensors_of(f / "model.safetensors") for f in (tmp_path / "store", folder))
    name = "model.decoder.embed_tokens.weight"
    assert mx.array_equal(stored[name], given[name]).item()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_small_pieces_give_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", hidden=36, neurons=67, positions=16, dtype=getattr(mx, dtype))
    convert(folder, tmp_path / "store", QUICK)
    monkeypatch.setattr(numpy_matrix, "PIECE_BYTES", 700)
    convert(folder, tmp_path / "pieces", QUICK)
    whole, pieces = (contents(tmp_path / name) for name in ("store", "pieces"))
    for name in (Manifest.neurons_file, Manifest.neurons_checksums_file, Manifest.resident_file):
        assert whole[name] == pieces[name]
    reports = [read_manifest(tmp_path / name).predictors["lowrank"] for name in ("store", "pieces")]
    for key in ("recall", "predicted", "active"):  # sums in another order
        assert np.allclose(reports[0][key], reports[1][key], atol=0.02), key


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_rows_of_a_tensor(tmp_path: Path, kind: str) -> None:
    torch = pytest.importorskip("torch") if kind == "bin" else None
    for dtype in ("float32", "float16", "bfloat16"):
        folder = make_checkpoint(tmp_path / dtype, dtype=getattr(mx, dtype))
        weights = tensors_of(folder / "model.safetensors")
        if torch is not None:
            named = {n: torch.from_numpy(np.array(w.astype(mx.float32))) for n, w in weights.items()}
            torch.save({n: t.to(getattr(torch, dtype)) for n, t in named.items()}, folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        checkpoint = Checkpoint(folder)
        for name in ("model.decoder.embed_positions.weight", "model.decoder.layers.1.fc1.bias"):
            for begin, end in ((0, 1), (3, 10), (60, 66)):
                rows = checkpoint.load(name, begin, end)
                assert rows.dtype == weights[name].dtype
                assert mx.array_equal(rows, weights[name][begin:end]).item(), (name, begin, end)


def test_a_checkpoint_that_shrinks_while_it_is_read(own_checkpoint: Path) -> None:
    checkpoint = Checkpoint(own_checkpoint)
    os.truncate(own_checkpoint / "model.safetensors", 4000)
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight cannot be read \(it ends at byte 4000"):
        checkpoint.load("model.decoder.embed_tokens.weight", 1, 96)


def test_matrices_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    weight, x, h = (rng.standard_normal(shape, np.float32) for shape in ((50, 7), (4, 7), (4, 50)))
    monkeypatch.setattr(numpy_matrix, "PIECE_BYTES", 12 * 7 * 4)  # 12 rows
    for stored in (mx.array(weight), mx.array(np.ascontiguousarray(weight.T)).T):
        matrix = numpy_matrix.NumpyMatrix(stored)
        assert [(begin, end) for begin, end, _ in matrix.pieces()] == [(0, 12), (12, 24), (24, 36), (36, 48), (48, 50)]
        assert (matrix.rows(5, 40) == weight[5:40]).all()
        assert np.allclose(matrix.rows_dot(x), x @ weight.T, atol=1e-5)
        assert np.allclose(matrix.sum_of_rows(h), h @ weight, atol=1e-5)


def test_a_tied_output_matrix_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    weight = mx.array(rng.standard_normal((50, 8), np.float32)).astype(mx.float16)
    mx.save_safetensors(str(tmp_path / "one.safetensors"), {"other": mx.zeros((3, 3)), "embedding": weight})
    monkeypatch.setattr(numpy_matrix, "PIECE_BYTES", 12 * 8 * 4)  # 12 rows
    entry = read_header(tmp_path / "one.safetensors")[1]["embedding"]
    embedding = numpy_matrix.FileEmbedding(tmp_path / "one.safetensors", "embedding", entry, mx.float16)
    x = mx.array(rng.standard_normal((2, 3, 8), np.float32))
    logits = embedding.as_linear(x)
    assert logits.shape == (2, 3, 50) and logits.dtype == mx.float32
    assert np.allclose(np.array(logits), np.array(x) @ np.array(weight.astype(mx.float32)).T, atol=1e-5)


# -- interrupted ---------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an Exception, so that nothing catches it."""


STEPS = ("fsync", "rename", "replace", "unlink", "mkdir")


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """stop_at(n, error) raises at the n-th system call that persists something, and at each one after it."""
    real = {name: getattr(os, name) for name in STEPS} | {"fsync": lambda _: None}  # fsync is slow

    def arm(step: int | None, error: BaseException = Killed()) -> None:  # noqa: B008
        counter = itertools.count(1)

        def counted(name: str) -> Callable[..., Any]:
            def call(*arguments: Any, **keywords: Any) -> Any:
                if step is not None and next(counter) >= step:
                    raise error
                return real[name](*arguments, **keywords)

            return call

        for name in STEPS:
            monkeypatch.setattr(os, name, counted(name))

    return arm


def stopped_runs(
    stop_at: Callable[..., None], run: Callable[[int], object], first: int = 1, before: Sequence[int] = ()
) -> Iterator[int]:
    """Runs a function repeatedly, stopped at the steps `before`, then one step later each time, until it completes."""
    for step in itertools.chain(before, itertools.count(first)):
        stop_at(step)
        try:
            run(step)
        except Killed:
            stop_at(None)
            yield step
        else:
            stop_at(None)
            assert step > 20
            return


def test_stopped_at_every_step_it_goes_on_to_the_same_bytes(
    checkpoint: Path, reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Starts from the disk contents before each step, as after a kill: buffers in the process are lost."""
    (tmp_path / "whole").mkdir()
    stopped: list[Path] = []

    def kept(name: str) -> Callable[..., Any]:
        call = getattr(os, name)

        def keep(*arguments: Any, **keywords: Any) -> Any:
            with monkeypatch.context() as patch:  # copying makes folders
                for name, function in real.items():
                    patch.setattr(os, name, function)
                stopped.append(Path(shutil.copytree(tmp_path / "whole", tmp_path / str(len(stopped)))))
            return None if call is real["fsync"] else call(*arguments, **keywords)  # fsync is slow

        return keep

    real = {name: getattr(os, name) for name in STEPS}
    with monkeypatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, kept(name))
        convert(checkpoint, tmp_path / "whole" / "store", QUICK)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    assert len(stopped) > 40
    seen: list[dict[str, bytes | None]] = []
    for folder in stopped:
        found = {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}
        if found in seen:  # the same as before an fsync and the rename after it
            continue
        seen.append(found)
        output = folder / "store"
        if output.exists():  # stopped after the rename, so it is complete
            assert read_manifest(output)
            with pytest.raises(UsageError, match="already a complete store"):
                convert(checkpoint, output, QUICK)
        else:
            convert(checkpoint, output, QUICK)
        assert contents(output) == reference, folder.name
        shutil.rmtree(folder)
    assert len(seen) > 20


def test_replacing_stopped_at_every_step_loses_neither_store(
    checkpoint: Path, reference: dict[str, bytes], tmp_path: Path, stop_at: Callable[..., None]
) -> None:
    convert(checkpoint, tmp_path / "old", Settings("float16", calibration_tokens=64))
    old = contents(tmp_path / "old")

    def replace(step: int) -> None:
        shutil.copytree(tmp_path / "old", tmp_path / str(step))
        convert(checkpoint, tmp_path / str(step), QUICK, overwrite=True)

    steps = 0
    # Until the new store is complete, the steps are those of the test above, beside the old store. A few are enough.
    # Here the process lives on, and its later changes to the disk raise as well.
    for step in stopped_runs(stop_at, replace, first=40, before=(6, 20, 34)):
        output = tmp_path / str(step)
        aside = tmp_path / f".{step}.replaced"
        present = contents(output if output.exists() else aside if aside.exists() else tmp_path / "old")
        present.pop("conversion.json", None)
        assert present in (old, reference)
        if not output.exists() and not aside.exists():
            continue  # stopped in copytree, before the conversion began
        convert(checkpoint, output, QUICK, overwrite=True)
        assert contents(output) == reference, step
        assert not aside.exists() and not (tmp_path / f"{step}.partial").exists()
        steps += 1
        shutil.rmtree(output)
    assert steps > 10


KILL = """
import os, signal, sys
from pathlib import Path
from mlx_flash.convert.conversion import Settings, convert
left, real = int(sys.argv[3]), os.fsync
def fsync(descriptor):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)
os.fsync = fsync
convert(Path(sys.argv[1]), Path(sys.argv[2]), Settings(calibration_tokens=64))
"""


def test_kill_9_at_random_moments(checkpoint: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    moments = np.random.default_rng().choice(np.arange(1, 18), 2, replace=False).tolist()
    children = [
        subprocess.Popen([sys.executable, "-c", KILL, checkpoint, tmp_path / str(m), str(m)], stderr=subprocess.DEVNULL)
        for m in moments
    ]
    for moment, child in zip(moments, children, strict=True):
        assert child.wait(60) == -9
        output = tmp_path / str(moment)
        assert not output.exists() and (tmp_path / f"{moment}.partial").is_dir()
        convert(checkpoint, output, QUICK)
        assert contents(output) == reference, moment


def test_ctrl_c_says_how_to_go_on(
    checkpoint: Path, reference: dict[str, bytes], tmp_path: Path, stop_at: Callable[..., None], cli: Cli
) -> None:
    stop_at(6, KeyboardInterrupt())
    code, err = cli("--model", checkpoint, "--output", tmp_path / "store")
    stop_at(None)
    assert code == 130 and "run the same command again to continue" in err and "Traceback" not in err
    code, err = cli("--model", checkpoint, "--output", tmp_path / "store")
    assert code == 0 and "continuing the conversion" in err
    assert contents(tmp_path / "store") == reference


def test_no_space_in_the_middle(
    checkpoint: Path, reference: dict[str, bytes], tmp_path: Path, stop_at: Callable[..., None], cli: Cli
) -> None:
    for step in (4, 9, 14):
        stop_at(step, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(NoSpaceError, match="run the same command again"):
            convert(checkpoint, tmp_path / "store", QUICK)
        stop_at(None)
        assert (tmp_path / "store.partial" / "conversion.json").exists()
    convert(checkpoint, tmp_path / "store", QUICK)
    assert contents(tmp_path / "store") == reference
    stop_at(6, OSError(errno.EIO, "Input/output error"))
    code, err = cli("--model", checkpoint, "--output", tmp_path / "other")
    stop_at(None)
    assert code == 1 and "Input/output error" in err and "run the same command again" in err


def test_no_space_before_the_start(
    checkpoint: Path, reference: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=64 << 20))
        with pytest.raises(NoSpaceError, match=r"needs 0\.07 GB more .* where 0\.07 GB are free"):
            convert(checkpoint, tmp_path / "store", QUICK)
    assert not (tmp_path / "store").exists()
    convert(checkpoint, tmp_path / "store", QUICK)
    assert contents(tmp_path / "store") == reference


@pytest.mark.parametrize("change", ["dtype", "calibration", "weights", "config", "record", "tokenizer"])
def test_another_input_begins_anew(
    own_checkpoint: Path, tmp_path: Path, stop_at: Callable[..., None], change: str
) -> None:
    stop_at(20)
    with pytest.raises(Killed):
        convert(own_checkpoint, tmp_path / "store", QUICK)
    stop_at(None)
    settings = QUICK
    if change == "dtype":
        settings = Settings("bfloat16", calibration_tokens=64)
    elif change == "calibration":
        settings = Settings(calibration_tokens=128)
    elif change == "weights":
        make_checkpoint(own_checkpoint, neurons=128, seed=1)
    elif change == "config":
        make_checkpoint(own_checkpoint, neurons=128, extra="x")
    elif change == "tokenizer":
        (own_checkpoint / "special_tokens_map.json").write_text("{}")
    else:  # a torn write
        (tmp_path / "store.partial" / "conversion.json").write_bytes(b'{"\xff')
    convert(own_checkpoint, tmp_path / "store", settings)
    convert(own_checkpoint, tmp_path / "undisturbed", settings)
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


def test_damaged_work_files_are_made_again(
    checkpoint: Path, reference: dict[str, bytes], tmp_path: Path, stop_at: Callable[..., None]
) -> None:
    stop_at(20)
    with pytest.raises(Killed):
        convert(checkpoint, tmp_path / "store", QUICK)
    stop_at(None)
    work = sorted((tmp_path / "store.partial").glob("layer-*.safetensors"))
    assert work
    for path in work:
        path.write_bytes(path.read_bytes()[:50])
    (tmp_path / "store.partial" / MANIFEST).write_text("{")
    convert(checkpoint, tmp_path / "store", QUICK)
    assert contents(tmp_path / "store") == reference


# -- outputs that must not be touched ------------------------------------------------------------------------


def test_another_process_converts_already(checkpoint: Path, tmp_path: Path) -> None:
    hold = "import sys, filelock; held = filelock.FileLock(sys.argv[1]).acquire(); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / "store.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin and child.stdout
        child.stdout.readline()
        for _ in range(2):  # a refusal must not remove the lock file
            with pytest.raises(ConversionError, match="another process is converting"):
                convert(checkpoint, tmp_path / "store", QUICK)
        assert not (tmp_path / "store.partial").exists()
        child.stdin.close()
    convert(checkpoint, tmp_path / "store", QUICK)


def test_existing_outputs(checkpoint: Path, reference: dict[str, bytes], tmp_path: Path, cli: Cli) -> None:
    output = tmp_path / "store"
    output.mkdir()  # an empty folder is accepted
    convert(checkpoint, output, QUICK)
    code, err = cli("--model", checkpoint, "--output", output)
    assert code == 2 and "already a complete store" in err and "--overwrite" in err
    code, err = cli("--model", checkpoint, "--output", output, "--overwrite", "--dtype", "float16")
    assert code == 0 and read_manifest(output).layout.dtype == "float16"
    old = contents(output)
    (output / "neurons.bin").unlink()  # damaged, but a store
    convert(checkpoint, output, QUICK, overwrite=True)
    assert contents(output) == reference != old


def test_a_failed_conversion_leaves_the_old_store(own_checkpoint: Path, tmp_path: Path) -> None:
    convert(own_checkpoint, tmp_path / "store", QUICK)
    old = contents(tmp_path / "store")
    weights = tensors_of(own_checkpoint / "model.safetensors")
    del weights["model.decoder.layers.1.fc2.weight"]
    mx.save_safetensors(str(own_checkpoint / "model.safetensors"), weights)
    with pytest.raises(CheckpointError, match="no tensor"):
        convert(own_checkpoint, tmp_path / "store", QUICK, overwrite=True)
    assert contents(tmp_path / "store") == old


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_files_are_never_replaced(checkpoint: Path, tmp_path: Path, overwrite: bool) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for name, text in (("diary.txt", "dear diary"), ("manifest.json", '{"name": "an app"}')):
        (mine / name).write_text(text)
        with pytest.raises(UsageError, match="other files in it"):
            convert(checkpoint, mine, QUICK, overwrite)
    with pytest.raises(UsageError, match="is a file"):
        convert(checkpoint, mine / "diary.txt", QUICK, overwrite)
    shutil.copytree(mine, tmp_path / "store.partial")
    with pytest.raises(UsageError, match="not left over from a conversion"):
        convert(checkpoint, tmp_path / "store", QUICK, overwrite)
    (tmp_path / "other.partial").write_text("x")
    with pytest.raises(UsageError, match="in the way"):
        convert(checkpoint, tmp_path / "other", QUICK, overwrite)
    with pytest.raises(ConversionError, match=r"cannot write .* Choose an --output elsewhere\.$"):  # nothing is kept
        convert(checkpoint, mine / "diary.txt" / "store", QUICK, overwrite)
    assert contents(mine) == contents(tmp_path / "store.partial") and len(contents(mine)) == 2
    assert (tmp_path / "other.partial").read_text() == "x"


def test_a_folder_in_which_no_file_can_be_made(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/proc is such a folder: the lock cannot be taken, although no other process has it."""

    def acquire(lock: FileLock, **_: object) -> None:
        raise Timeout(lock.lock_file)

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(ConversionError, match="no file can be made in its folder"):
        convert(checkpoint, tmp_path / "store", QUICK)
    (tmp_path / "store.lock").touch()
    with pytest.raises(ConversionError, match="another process"):
        convert(checkpoint, tmp_path / "store", QUICK)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_checkpoint_is_never_the_output(own_checkpoint: Path, overwrite: bool) -> None:
    before = contents(own_checkpoint)
    for output in (own_checkpoint, own_checkpoint.parent, own_checkpoint / ".." / own_checkpoint.name):
        with pytest.raises(UsageError, match="holds the checkpoint itself"):
            convert(own_checkpoint, output, QUICK, overwrite)
    convert(own_checkpoint, own_checkpoint / "store", QUICK, overwrite)  # a folder inside it is fine
    shutil.rmtree(own_checkpoint / "store")
    assert contents(own_checkpoint) == before


def test_a_linked_output_stays_a_link(checkpoint: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "store")
    convert(checkpoint, tmp_path / "link", QUICK)
    convert(checkpoint, tmp_path / "link", QUICK, overwrite=True)
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "disk" / "store") == reference
    with pytest.raises(UsageError, match="is already a store"):
        convert(tmp_path / "link", tmp_path / "again", QUICK)


# -- checkpoints that are not what they should be ------------------------------------------------------------


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, **changes: mx.array | None) -> None:
    """Replaces tensors by the last two parts of their names in layer 1; None removes one."""
    weights = tensors_of(folder / "model.safetensors")
    for name, value in changes.items():
        full = "model.decoder.layers.1." + name.replace("_weight", ".weight")
        if value is None:
            del weights[full]
        else:
            weights[full] = value
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)


def lose_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def break_index(folder: Path, names: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def huge_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + path.read_bytes()[8:])


def strange_name(folder: Path) -> None:
    weights = tensors_of(folder / "model.safetensors")
    mx.save_safetensors(str(folder / "model.safetensors"), {**weights, "decoder.layers.1": mx.zeros(1)})


def only_torch(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    sys.modules["torch"] = None  # type: ignore[assignment]  # the fixture puts it back


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
    "config no UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json is not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "no tensor": (lambda f: change_weights(f, fc1_weight=None), "no tensor model.decoder.layers.1.mlp.fc1.weight"),
    "wrong shape": (lambda f: change_weights(f, fc2_weight=mx.zeros((64, 64))), "expected (64, 128)"),
    "another width": (lambda f: change_config(f, ffn_dim=256), "fc1.bias has shape (128,), expected (256,)"),
    "more layers": (lambda f: change_config(f, num_hidden_layers=3), "no tensor model.decoder.layers.2"),
    "no layers": (lambda f: change_config(f, num_hidden_layers=0), "num_hidden_layers is 0"),
    "too many layers": (lambda f: change_config(f, num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "layers a word": (lambda f: change_config(f, num_hidden_layers="two"), "does not describe a model"),
    "no heads": (lambda f: change_config(f, num_attention_heads=0), "does not describe a model"),
    "strange name": (strange_name, "does not describe a model"),
    "no hidden size": (lambda f: change_config(f, hidden_size=None), "does not describe a model"),
    "lost shard": (lose_shard, "lacks 1 of 2 shards, the first is model-00002-of-00002.safetensors"),
    "index of numbers": (lambda f: break_index(f, {"a": 1}), "is not an index of shards"),
    "index leads outside": (lambda f: break_index(f, {"a": "../model.safetensors"}), "is not an index of shards"),
    "index a list": (lambda f: break_index(f, []), "is not an index of shards"),
    "truncated": (cut, "its tensors end at byte"),
    "lying header": (huge_header, "its header claims"),
    "no header": (lambda f: (f / "model.safetensors").write_bytes(b"x"), "is not a valid safetensors file"),
    "no family": (lambda f: change_config(f, model_type=None), "is of model type None, which neither"),
    "gelu": (lambda f: change_config(f, activation_function="gelu"), "uses the activation 'gelu'"),
    "torch is missing": (only_torch, "reading it needs torch"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_end_in_their_own_message(
    own_checkpoint: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    damage, words = BROKEN[case]
    monkeypatch.setitem(sys.modules, "torch", sys.modules.get("torch"))  # type: ignore[arg-type]
    damage(own_checkpoint)
    code, err = cli("--model", own_checkpoint, "--output", tmp_path / "store")
    assert code == 1 and words in err and "Traceback" not in err, err
    assert not (tmp_path / "store").exists() and not (tmp_path / "store.partial").exists()


def test_wrong_usage(checkpoint: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "short.txt").write_text("x")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    usual = ("--model", checkpoint, "--output", tmp_path / "store")
    for arguments, words in (
        ((), "required"),
        (("--model", tmp_path / "nowhere", "--output", tmp_path / "store"), "is neither a folder"),
        ((*usual, "--calibration", tmp_path / "nowhere.txt"), "cannot read --calibration"),
        ((*usual, "--calibration", tmp_path / "binary.txt"), "cannot read --calibration"),
        ((*usual, "--calibration-tokens", "3"), "3 is not between 16 and"),
        ((*usual, "--dtype", "int8"), "invalid choice"),
    ):
        code, err = cli(*arguments)
        assert code == 2 and words in err and "Traceback" not in err, err
    assert not (tmp_path / "store.partial").exists()


def test_rows_that_do_not_divide_into_groups_are_refused(tmp_path: Path, cli: Cli) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", hidden=48)
    code, said = cli("--model", folder, "--output", tmp_path / "store", "--bits", "4")
    assert code == 2 and "rows of 48 numbers do not divide into groups of 64. Use --bits 16" in said
    # Resident matrices are not quantised there.
    code, said = cli("--model", folder, "--output", tmp_path / "store", "--resident-bits", "4")
    assert code == 0 and "resident matrices in 4 bits" in said
    assert check_store(tmp_path / "store") == []
    assert not any(name.endswith(".scales") for name in tensors_of(tmp_path / "store" / Manifest.resident_file))


def test_other_bits_are_another_conversion(checkpoint: Path, tmp_path: Path) -> None:
    stores: dict[tuple[int, int], list[dict[str, bytes]]] = {}
    for bits, resident in ((4, 16), (4, 4), (4, 4)):
        manifest = convert(checkpoint, tmp_path / "store", replace(QUICK, bits=bits, resident_bits=resident), True)
        assert (manifest.layout.bits, manifest.layout.group_size) == (4, 64)
        assert (manifest.resident_bits, manifest.resident_group_size) == ((4, 64) if resident == 4 else (16, 0))
        assert check_store(tmp_path / "store") == []
        stores.setdefault((bits, resident), []).append(contents(tmp_path / "store"))
    assert stores[4, 4][0] == stores[4, 4][1]
    plain, packed = stores[4, 16][0], stores[4, 4][0]
    assert plain["neurons.bin"] == packed["neurons.bin"]
    assert len(packed["model.safetensors"]) < 0.5 * len(plain["model.safetensors"])


def test_a_tokenizer_with_an_empty_vocabulary_is_not_calibrated_with(tiny: Any, tmp_path: Path) -> None:
    """The error does not mention a text, because none was given."""
    checkpoint = Path(shutil.copytree(tiny.checkpoint, tmp_path / "checkpoint"))
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {}
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* has 0 tokens, .* Is its vocabulary empty\?"):
        convert(checkpoint, tmp_path / "store", Settings())


def test_calibration_text_must_have_tokens_of_this_model(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(UsageError, match="expected at least 16"):
        convert(tiny.checkpoint, tmp_path / "store", Settings(calibration_text=tmp_path / "short.txt"))
    (tmp_path / "short.txt").write_text("just long enough for this")
    convert(tiny.checkpoint, tmp_path / "store", Settings(calibration_text=tmp_path / "short.txt"))
    small = make_checkpoint(tmp_path / "small", vocab=20)
    for path in tiny.checkpoint.glob("tokenizer*"):
        shutil.copy(path, small)
    with pytest.raises(CheckpointError, match="Do they belong together"):
        convert(small, tmp_path / "other", QUICK)


def test_the_real_command_line(checkpoint: Path, tmp_path: Path) -> None:
    run = f"-m mlx_flash.convert --model {checkpoint / 'config.json'} --output {tmp_path / 's'}".split()
    done = subprocess.run([sys.executable, *run], capture_output=True, text=True)
    assert done.returncode == 2 and "is a file" in done.stderr and "Traceback" not in done.stderr
