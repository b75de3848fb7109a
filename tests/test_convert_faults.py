"""A conversion that cannot read back its output, or reads other bytes, ends in an error and leaves no valid store."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from tiny import make_checkpoint  # type: ignore[import-not-found]

from mlx_flash.check import check_store
from mlx_flash.convert.conversion import Settings, _Conversion, convert
from mlx_flash.convert.sums import SUMS, WrittenSums
from mlx_flash.errors import CheckpointError, ConversionError
from mlx_flash.flash.safetensors_file import read_header

Damage = Callable[[Path], None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny", neurons=128)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings with a short text, because tokenising the default text takes long."""
    text = tmp_path_factory.mktemp("calibration") / "text.txt"
    text.write_text("It was a dark night, and the old dog slept beside the fire. " * 8)
    return Settings(calibration_text=text, calibration_tokens=64)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def reference(checkpoint: Path, quick: Settings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("reference") / "store"
    convert(checkpoint, folder, quick)
    assert check_store(folder) == []
    return contents(folder)


@pytest.fixture
def when_written(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Damage | None], None]:
    """when_written(name, damage) damages a file of the partial folder as soon as it has its final name."""
    real = Path.replace
    waiting: dict[str, Damage | None] = {}

    def replace(self: Path, target: Path) -> Path:
        result = real(self, target)
        if damage := waiting.pop(target.name, None):
            damage(target)
        return result

    monkeypatch.setattr(Path, "replace", replace)
    return waiting.__setitem__


def flipped(tensor: str) -> Damage:
    def damage(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(read_header(path)[1][tensor].begin if tensor else 40)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))

    return damage


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


PREFIX = "model.decoder."


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("model.safetensors", flipped(""), "model.safetensors"),
        ("model.safetensors", flipped(PREFIX + "embed_tokens.weight"), "tensor .*embed_tokens.weight does not match"),
        ("model.safetensors", flipped(PREFIX + "layers.1.self_attn.k_proj.weight"), "tensor .*k_proj.weight does not"),
        ("model.safetensors", flipped(PREFIX + "layers.0.final_layer_norm.weight"), "tensor .*layer_norm.weight does"),
        ("model.safetensors", cut, r"model.safetensors cannot be read: its tensors end"),
        ("layer-0001-lowrank.safetensors", flipped("b"), "layer-0001-lowrank.safetensors: tensor b does not match"),
        ("layer-0000-shadow.safetensors", Path.unlink, "layer-0000-shadow.safetensors vanished"),
    ],
)
def test_what_is_read_back_is_what_was_written(
    checkpoint: Path,
    quick: Settings,
    reference: dict[str, bytes],
    tmp_path: Path,
    when_written: Callable[[str, Damage | None], None],
    name: str,
    damage: Damage,
    said: str,
) -> None:
    when_written(name, damage)
    with pytest.raises(ConversionError, match=said):
        convert(checkpoint, tmp_path / "store", quick)
    assert not (tmp_path / "store").exists()
    convert(checkpoint, tmp_path / "store", quick)
    assert contents(tmp_path / "store") == reference


@pytest.mark.parametrize(
    ("name", "tensor"), [("layer-0000-lowrank.safetensors", "a"), ("layer-0001-shadow.safetensors", "weight")]
)
@pytest.mark.parametrize(
    ("opened", "said"),
    [  # opened for the choice on calibration text; opened for merging, before its tensors are read
        (2, r"tensor \w+ cannot be read: the file ends at byte"),
        (3, r"its header cannot be read|cannot be read: its tensors end at byte"),
    ],
)
def test_a_layer_s_predictor_that_cannot_be_read_back(
    checkpoint: Path,
    quick: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    tensor: str,
    opened: int,
    said: str,
) -> None:
    """Earlier, such a tensor had random memory contents, and `check` found no damage."""
    real, left = mx.load, opened

    def load(path: str) -> Any:
        nonlocal left
        result = real(path)
        if Path(path).name == name:
            left -= 1
            if not left:
                os.truncate(path, read_header(Path(path))[1][tensor].begin)
        return result

    monkeypatch.setattr(mx, "load", load)
    with pytest.raises(ConversionError, match=rf"{name}.*{said}"):
        convert(checkpoint, tmp_path / "store", quick)
    assert not left and not (tmp_path / "store").exists()


def test_checksums_are_of_what_was_written(
    checkpoint: Path,
    quick: Settings,
    reference: dict[str, bytes],
    tmp_path: Path,
    when_written: Callable[[str, Damage | None], None],
) -> None:
    """A damaged file that is not read back does not pass either: a comparison with the manifest finds the damage."""
    when_written("predictor-lowrank.safetensors", flipped("1.c"))
    convert(checkpoint, tmp_path / "store", quick)
    assert (tmp_path / "store" / "manifest.json").read_bytes() == reference["manifest.json"]
    (damage,) = check_store(tmp_path / "store")
    assert (damage.file, damage.where) == ("predictor-lowrank.safetensors", "tensor 1.c")


@pytest.mark.parametrize("name", ["neurons.crc32", "neurons.bin", "model.safetensors", SUMS])
@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_a_later_run_takes_nothing_that_is_not_what_was_written(
    checkpoint: Path,
    quick: Settings,
    reference: dict[str, bytes],
    tmp_path: Path,
    when_written: Callable[[str, Damage | None], None],
    name: str,
    how: str,
) -> None:
    def stop(_: Path) -> None:
        raise KeyboardInterrupt

    when_written("layer-0000-lowrank.safetensors", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, tmp_path / "store", quick)
    path = tmp_path / "store.partial" / name
    if how == "gone":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[-min(200, len(content))] ^= 1  # in the last layer's last block, a tensor, a line, or the first table
        path.write_bytes(content)
    convert(checkpoint, tmp_path / "store", quick)
    assert contents(tmp_path / "store") == reference


def test_a_checkpoint_that_cannot_be_read_names_file_and_tensor(
    checkpoint: Path, quick: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    real = mx.eval

    def fail(*arrays: Any) -> None:
        if len(arrays) == 1 and getattr(arrays[0], "shape", None) == (128, 64):
            raise RuntimeError("[read] Unable to read from file.")
        real(*arrays)

    monkeypatch.setattr(mx, "eval", fail)
    with pytest.raises((ConversionError, CheckpointError), match=r"model.safetensors: tensor \S+fc1.weight cannot be"):
        convert(own, tmp_path / "store", quick)


def test_the_log_of_checksums(tmp_path: Path) -> None:
    sums = WrittenSums(tmp_path)
    sums.add("a", {"": 1, "x": 2})
    sums.add("b", {"": 3})
    sums.add("a", {"": 4})
    assert WrittenSums(tmp_path).of("a") == {"": 4} and WrittenSums(tmp_path).of("c") is None
    path = tmp_path / SUMS
    path.write_bytes(path.read_bytes() + b'{"file": "b", "crc32": {"": 9')  # a kill within a line
    sums = WrittenSums(tmp_path)
    assert sums.of("b") == {"": 3}
    sums.add("c", {"": 5})
    assert WrittenSums(tmp_path).of("c") == {"": 5}
    path.write_bytes(b'[]\n{"file": 1}\n\xff\n{"file": "d", "crc32": {"": "x"}}\n' + path.read_bytes())
    assert WrittenSums(tmp_path).of("a") == {"": 4} and WrittenSums(tmp_path).of("d") is None


def test_predictors_are_not_calibrated_on_random_tokens_because_of_a_fault(
    checkpoint: Path, quick: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer file is read wrong. Random tokens would give worse predictors than the checkpoint's own text."""
    from mlx_flash.convert import conversion

    real = conversion.compared_copies

    def cut(folder: Path, names: list[str], compare: Callable[..., None]) -> Any:
        def cut_compare(path: Path, status: os.stat_result, content: bytes) -> None:
            compare(path, status, b"" if path.name == "tokenizer_config.json" else content)

        return real(folder, names, cut_compare)

    monkeypatch.setattr(conversion, "compared_copies", cut)
    with pytest.raises(ConversionError, match=r"/tokenizer_config\.json changed during the conversion\. Run the same"):
        convert(checkpoint, tmp_path / "store", quick)
    monkeypatch.undo()
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / "tokenizer_config.json").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is empty, expected JSON"):
        convert(broken, tmp_path / "store", quick)
    assert not (tmp_path / "store").exists()


def test_a_checkpoint_without_a_tokenizer(
    checkpoint: Path, quick: Settings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bare = shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    convert(bare, tmp_path / "store", quick)
    assert "bare has no tokenizer files" in (errors := capfd.readouterr().err) and "random tokens" in errors


def test_a_checkpoint_that_changes_meanwhile(
    checkpoint: Path, quick: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    file, real = folder / "model.safetensors", _Conversion._manifest

    def changing(*arguments: Any) -> Any:
        content = file.read_bytes()
        file.write_bytes(content[:-64] + bytes(64))
        return real(*arguments)

    monkeypatch.setattr(_Conversion, "_manifest", changing)
    with pytest.raises(ConversionError, match=r"model\.safetensors changed or vanished while it was converted"):
        convert(folder, tmp_path / "store", quick)
    assert not (tmp_path / "store").exists()
