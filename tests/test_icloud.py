"""Files whose contents are in iCloud are refused before anything of them is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mixtures import make_mixture  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.errors import ReadError
from mlx_flash.flash import dataless
from mlx_flash.flash.files import read_manifest
from mlx_flash.source.checkpoint_files import files_in

WEIGHTS = "model.safetensors"


def evict(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a file look like one whose contents are in iCloud, on any system."""
    inode = (folder / name).stat().st_ino
    monkeypatch.setattr(dataless, "_flags_of", lambda status: 0x40000020 if status.st_ino == inode else 0x20)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json"])
def test_a_checkpoint_in_icloud_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = make_mixture(tmp_path / "model", "qwen3_moe")
    write_tokenizer(folder)
    (folder / "README.md").write_text("not read")
    (folder / ".notes.pdf.icloud").write_bytes(b"bplist00")
    assert WEIGHTS in files_in(folder)
    with monkeypatch.context() as patched:
        evict(folder, name, patched)
        with pytest.raises(ReadError, match=rf"{name} is in iCloud, .* not on this disk\. Download it first"):
            mlx_flash.plan(folder)
    (folder / name).rename(folder / f".{name}.icloud")  # as earlier versions of macOS do
    with pytest.raises(ReadError, match=rf"{name} is in iCloud"):
        mlx_flash.plan(folder)
    (folder / f".{name}.icloud").rename(folder / name)
    assert mlx_flash.plan(folder).total


def test_a_store_in_icloud_is_refused(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("neurons.bin", WEIGHTS, "config.json"):
        with monkeypatch.context() as patched:
            evict(own_store, name, patched)
            with pytest.raises(ReadError, match=f"{name} is in iCloud"):
                read_manifest(own_store)
        (own_store / name).rename(own_store / f".{name}.icloud")
        with pytest.raises(ReadError, match=f"{name} is in iCloud"):
            read_manifest(own_store)
        (own_store / f".{name}.icloud").rename(own_store / name)
    read_manifest(own_store)
