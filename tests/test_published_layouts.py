"""Mixtures in the layouts that their makers publish: read in place, with the bits of mlx-lm's resident model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mixtures import VOCABULARY, make_mixture, open_streamed  # type: ignore[import-not-found]
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from published_layouts import CHANGED, LAYOUTS, PACKED, publish  # type: ignore[import-not-found]
from test_mixture import assert_same, everything  # type: ignore[import-not-found]

from mlx_flash.errors import ReadError, UnsupportedModelError
from mlx_flash.flash.safetensors_file import read_header
from mlx_flash.loading import load
from mlx_flash.loading.in_place_model import open_in_place

pytestmark = pytest.mark.usefixtures("one_processor")


def published(tmp_path: Path, family: str) -> Path:
    """A checkpoint in the original layout, from which mlx-lm makes the weights of the one in MLX's layout."""
    folder = make_mixture(tmp_path / family, family, PACKED.get(family, "plain"))
    plain: Any = dict(tree_flatten(load_model(folder)[0].parameters()))
    names = set(read_header(folder / "model.safetensors")[1])
    publish(folder, family)
    assert set(read_header(folder / "model.safetensors")[1]) != names
    read: Any = tree_flatten(load_model(folder)[0].parameters())
    for name, array in read:
        assert np.allclose(np.array(array), np.array(plain[name]), atol=1e-6), name
    return folder


@pytest.mark.parametrize("family", sorted(LAYOUTS.keys() - CHANGED))
def test_published_layouts(tmp_path: Path, family: str) -> None:
    folder = published(tmp_path, family)
    expected = everything(load_model(folder)[0])
    for slots in (2, 12):
        model, streamer = open_streamed(folder, slots)
        assert_same(everything(model), expected, slots)
        assert streamer.counters.bytes > 0
        streamer.close()


@pytest.mark.parametrize("family", sorted(CHANGED))
def test_layouts_that_mlx_lm_rearranges_are_refused(tmp_path: Path, family: str) -> None:
    folder = published(tmp_path, family)
    with pytest.raises(UnsupportedModelError, match=rf"does not store .*mlxflash convert --model {folder} --output"):
        open_in_place(folder)


def test_a_fused_tensor_s_sources(tmp_path: Path) -> None:
    """One tensor of the checkpoint is the source of two parameters, and all of it counts as experts'."""
    folder = make_mixture(tmp_path / "granite", "granitemoe")
    publish(folder, "granitemoe")
    mixture = open_in_place(folder)
    fused = "model.layers.0.block_sparse_moe.input_linear.weight"
    for name in ("gate_proj", "up_proj"):
        assert mixture.sources[f"model.layers.0.block_sparse_moe.switch_mlp.{name}.weight"] == [fused]
    assert fused in mixture.behind(mixture.of_experts())
    gate, up = (
        mixture.switches["model.layers.0.block_sparse_moe.switch_mlp"][f"{n}.weight"] for n in ("gate_proj", "up_proj")
    )
    assert np.array_equal(gate.offsets + gate.nbytes, up.offsets) and gate.shape == (64, 64)


@pytest.mark.parametrize("family", ["granitemoehybrid", "mixtral", "qwen3_5_moe"])
def test_published_layouts_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """With --verify, every byte is compared, of a tensor with two parameters as well."""
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    folder = published(tmp_path, family)
    write_tokenizer(folder, VOCABULARY)
    expected = load_model(folder)[0](mx.array([[5, 17, 80]]))
    model, _ = load.load(folder, context=64, verify=True)
    assert mx.array_equal(model(mx.array([[5, 17, 80]])), expected)
    model.flash.close()
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    for name, entry in read_header(path)[1].items():
        if "experts" in name or "moe" in name:
            content[entry.begin : entry.end] = bytes(entry.end - entry.begin)
    monkeypatch.setattr(load, "fill_slots", lambda *_: None)  # It would read all experts before the disk is faulty.
    model, _ = load.load(folder, context=64, verify=True)
    with path.open("r+b") as file:  # as a disk that is faulty
        file.write(content)
    with pytest.raises(ReadError, match=r"switch_mlp, expert .* have the checksum"):
        model(mx.array([[5, 17, 80]]))
    model.flash.close()
