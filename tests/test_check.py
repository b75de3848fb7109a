"""`python -m mlx_flash.check` covers every byte of a store and names the place of any damage."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlx_flash import check
from mlx_flash.check import Damage, check_store, unlisted_files
from mlx_flash.cli.run import run_command
from mlx_flash.errors import NewerFormatError
from mlx_flash.flash import files
from mlx_flash.flash.files import MANIFEST, Manifest, NeuronLayout, read_manifest
from mlx_flash.flash.safetensors_file import read_header


def flip(path: Path, *places: int) -> None:
    data = bytearray(path.read_bytes())
    for place in places:
        data[place] ^= 0x10
    path.write_bytes(data)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process. Returns (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["check", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            run_command(check.make_parser(), check.main)
        code = exit.value.code
        return int(code or 0), *capsys.readouterr()

    return run


def expected_place(store: Path, layout: NeuronLayout, name: str, at: int) -> str:
    """The place of a flipped byte, computed independently of `check`."""
    if name == Manifest.neurons_file:
        layer, rest = divmod(at, layout.layer_bytes)
        if rest >= layout.blocks * layout.block_bytes:
            return f"padding after layer {layer}"
        neurons = [n for n in range(layout.neurons) if n // layout.neurons_per_block == rest // layout.block_bytes]
        return f"layer {layer}, " + (
            f"neurons {neurons[0]}-{neurons[-1]}" if len(neurons) > 1 else f"neuron {neurons[0]}"
        )
    if name.endswith(".safetensors"):
        header, entries = read_header(store / name)
        if at < len(header):
            return "header"
        return next(f"tensor {tensor}" for tensor, e in entries.items() if e.begin <= at < e.end)
    return ""


def test_a_whole_store(store: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    told: list[int] = []
    assert check_store(store, told.append) == []
    assert sum(told) == sum(entry["bytes"] for entry in read_manifest(store).files.values())
    code, out, err = cli(store)
    assert code == 0 and "warning" not in err
    total = sum(path.stat().st_size for path in store.iterdir())
    assert out == f"{store}: {len(list(store.iterdir()))} files, {total / 1e9:.2f} GB, no damage\n"


def test_a_flipped_byte_anywhere_is_found_and_named(own_store: Path) -> None:
    manifest = read_manifest(own_store)
    rng = np.random.default_rng(0)
    for name, entry in manifest.files.items():
        path, size = own_store / name, entry["bytes"]
        places = {0, size - 1, *rng.integers(size, size=6).tolist()}
        for at in places:
            where = expected_place(own_store, manifest.layout, name, at)
            flip(path, at)
            found = check_store(own_store)
            flip(path, at)
            assert (name, where) in {(damage.file, damage.where) for damage in found}, (at, found)
            others = [damage for damage in found if damage.file != name]
            # A damaged table of checksums also disagrees with the bundle file, and `check` reports that.
            assert all(name == "neurons.crc32" and "itself damaged" in damage.what for damage in others)
    assert check_store(own_store) == []


def test_a_flipped_byte_of_the_manifest(own_store: Path) -> None:
    for at in np.random.default_rng(1).integers((own_store / MANIFEST).stat().st_size, size=20).tolist():
        whole = (own_store / MANIFEST).read_bytes()
        flip(own_store / MANIFEST, at)
        with contextlib.suppress(NewerFormatError):
            assert [damage.file for damage in check_store(own_store)] == [MANIFEST], at
        (own_store / MANIFEST).write_bytes(whole)


@pytest.fixture
def padded_store(store: Path, tmp_path: Path) -> Path:
    """A store with padding inside the blocks, after the neurons of the last block, and between the layers."""
    from tiny import make_checkpoint  # type: ignore[import-not-found]

    from mlx_flash.convert.conversion import Settings, convert

    make_checkpoint(tmp_path / "checkpoint", hidden=36, neurons=67, layers=3)
    convert(tmp_path / "checkpoint", tmp_path / "store", Settings(calibration_tokens=64))
    return tmp_path / "store"


def test_padding_is_covered(padded_store: Path) -> None:
    layout = read_manifest(padded_store).layout
    path = padded_store / Manifest.neurons_file
    used = layout.neurons_per_block * layout.bundle_bytes
    assert used < layout.block_bytes and layout.neurons % layout.neurons_per_block
    assert layout.blocks * layout.block_bytes < layout.layer_bytes
    assert check_store(padded_store) == []
    last_neuron = (layout.blocks - 1) * layout.block_bytes
    for at in (used, layout.block_bytes - 1, last_neuron + layout.row_bytes * layout.neurons_per_block - 1):
        flip(path, layout.layer_bytes + at)
        (damage,) = check_store(padded_store)
        assert damage.where == expected_place(padded_store, layout, path.name, layout.layer_bytes + at)
        flip(path, layout.layer_bytes + at)
    flip(path, layout.layer_bytes - 1)
    assert [str(damage) for damage in check_store(padded_store)] == ["neurons.bin: padding after layer 0: is not zero"]


def test_all_damage_is_reported(own_store: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    layout = read_manifest(own_store).layout
    block = layout.block_bytes
    places = [block * 3, block * 4 + 9, block * 7, layout.layer_bytes, layout.layer_bytes + (layout.blocks - 1) * block]
    flip(own_store / "neurons.bin", *places)
    flip(own_store / "config.json", 3)
    (own_store / "predictor-shadow.safetensors").unlink()
    count = layout.neurons_per_block
    code, out, _ = cli(own_store)
    assert code == 1
    assert out.splitlines()[:-1] == [
        "config.json: does not match its checksum",
        f"neurons.bin: layer 0, neurons {3 * count}-{5 * count - 1}: does not match its checksum in neurons.crc32",
        f"neurons.bin: layer 0, neurons {7 * count}-{8 * count - 1}: does not match its checksum in neurons.crc32",
        f"neurons.bin: layer 1, neurons 0-{count - 1}: does not match its checksum in neurons.crc32",
        f"neurons.bin: layer 1, neurons {(layout.blocks - 1) * count}-{layout.neurons - 1}: "
        "does not match its checksum in neurons.crc32",
        "predictor-shadow.safetensors: is missing (" + out.split("is missing (")[1].splitlines()[0],
    ]


def test_much_damage_is_counted(own_store: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    layout = read_manifest(own_store).layout
    flip(own_store / "neurons.bin", *range(0, layout.blocks * layout.block_bytes, 2 * layout.block_bytes))
    code, out, _ = cli(own_store)
    found = len(check_store(own_store))
    assert code == 1 and found > check.SHOWN
    assert len(out.splitlines()) == check.SHOWN + 2 and f"... and {found - check.SHOWN} more" in out


def test_truncated_and_missing_files(own_store: Path) -> None:
    for name in read_manifest(own_store).files:
        path = own_store / name
        whole = path.read_bytes()
        for size in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            found = check_store(own_store)
            assert Damage(name, "", f"has {size} bytes, expected {len(whole)}") in found
        path.write_bytes(whole + b"x")
        assert check_store(own_store)[0].file == name
        path.unlink()
        assert Damage(name, "", f"is missing ({len(whole)} bytes)") in check_store(own_store)
        path.mkdir()  # a folder is not a file
        assert Damage(name, "", f"is missing ({len(whole)} bytes)") in check_store(own_store)
        path.rmdir()
        path.write_bytes(whole)


def test_a_truncated_bundle_file_is_checked_as_far_as_it_goes(own_store: Path) -> None:
    layout = read_manifest(own_store).layout
    path = own_store / "neurons.bin"
    flip(path, 0)
    path.write_bytes(path.read_bytes()[: layout.layer_bytes + 5 * layout.block_bytes])
    where = [damage.where for damage in check_store(own_store)]
    assert where == ["", f"layer 0, neurons 0-{layout.neurons_per_block - 1}", "layer 1"]


def test_lying_headers_end_in_a_message(own_store: Path) -> None:
    path = own_store / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 1 << 40, (1 << 64) - 1, len(whole)):
        path.write_bytes(length.to_bytes(8, "little") + whole[8:])
        (damage,) = check_store(own_store)
        assert damage.file == path.name and damage.where == "header"


def test_an_unreadable_file_is_damage(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> tuple[int, int]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(check, "crc32_of", fail)
    found = check_store(own_store)
    assert {damage.where for damage in found if damage.file == "neurons.bin"} == {"layer 0", "layer 1"}
    assert all("Input/output error" in damage.what for damage in found)


def test_foreign_files_are_a_warning(own_store: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    (own_store / "notes.md").write_text("mine")
    assert unlisted_files(own_store) == ["notes.md"]
    code, _, err = cli(own_store)
    assert code == 0 and "warning: notes.md is not part of the store" in err


def test_exit_codes(own_store: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = cli(tmp_path / "nowhere")
    assert code == 2 and "there is no folder" in err
    code, _, err = cli()
    assert code == 2 and "usage" in err
    (tmp_path / "empty").mkdir()
    code, _, err = cli(tmp_path / "empty")
    assert code == 1 and "no manifest.json" in err
    (own_store / MANIFEST).write_text("{")
    code, out, _ = cli(own_store)
    assert code == 1 and out.startswith("manifest.json: ")


def test_versions(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "VERSION", 0)
    with pytest.raises(NewerFormatError):
        check_store(own_store)
