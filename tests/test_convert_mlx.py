"""Conversion into MLX's form: mlx-lm loads the same numbers from it, or those of its own conversion, and so do we."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mixtures import VOCABULARY, make_mixture, open_streamed  # type: ignore[import-not-found]
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from published_layouts import publish  # type: ignore[import-not-found]
from test_mixture import assert_same, everything  # type: ignore[import-not-found]

from mlx_flash.cli.run import run_command
from mlx_flash.convert import __main__ as command
from mlx_flash.convert import mlx_form
from mlx_flash.convert.mlx_form import Wanted, convert_to_mlx
from mlx_flash.errors import ConversionError, NoSpaceError, UnsupportedModelError, UsageError
from mlx_flash.loading.in_place_model import open_in_place

pytestmark = pytest.mark.usefixtures("one_processor")


def parameters(folder: Path) -> dict[str, mx.array]:
    return dict(tree_flatten(load_model(folder)[0].parameters()))  # type: ignore[arg-type]


def assert_equal(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype and mx.array_equal(array, expected[name]), name


def published(folder: Path, family: str, quantisation: str = "plain", **changes: Any) -> Path:
    make_mixture(folder, family, quantisation, **changes)
    publish(folder, family)
    write_tokenizer(folder, VOCABULARY)
    return folder


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts come in several pieces, as those of a large model do."""
    monkeypatch.setattr(mlx_form, "PIECE_BYTES", 40_000)


@pytest.mark.parametrize(("family", "quantisation"), [("gpt_oss", "mxfp4"), ("llama4", "plain")])
def test_experts_that_mlx_lm_rearranges(tmp_path: Path, family: str, quantisation: str) -> None:
    """They cannot be read in place. Converted, they are, and the model is the same."""
    folder = published(tmp_path / "original", family, quantisation)
    with pytest.raises(UnsupportedModelError, match="mlxflash convert --model"):
        open_in_place(folder)
    convert_to_mlx(folder, tmp_path / "mlx", Wanted())
    assert_equal(parameters(tmp_path / "mlx"), parameters(folder))
    expected = everything(load_model(folder)[0])
    for slots in (1, 2, 8):
        model, streamer = open_streamed(tmp_path / "mlx", slots)
        assert_same(everything(model), expected, slots)
        streamer.close()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("family", ["deepseek_v3", "gemma4", "granitemoehybrid", "llama4", "qwen3_5_moe", "qwen3_moe"])
def test_quantised_as_by_mlx_lm(tmp_path: Path, family: str, dtype: str | None) -> None:
    folder = published(tmp_path / "original", family)
    mlx_lm.convert(str(folder), str(tmp_path / "theirs"), quantize=True, q_bits=4, dtype=dtype)
    convert_to_mlx(folder, tmp_path / "ours", Wanted(bits=4, dtype=dtype))
    assert_equal(parameters(tmp_path / "ours"), parameters(tmp_path / "theirs"))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    assert configs[0] == configs[1]
    ours, theirs = (json.loads((tmp_path / n / "model.safetensors.index.json").read_text()) for n in ("ours", "theirs"))
    assert ours["metadata"] == theirs["metadata"] and ours["weight_map"].keys() == theirs["weight_map"].keys()
    if dtype is None:
        model, streamer = open_streamed(tmp_path / "ours", 2)
        assert_same(everything(model), everything(load_model(tmp_path / "theirs")[0]), family)
        streamer.close()


def test_experts_in_other_bits(tmp_path: Path) -> None:
    folder = published(tmp_path / "original", "qwen3_moe")
    convert_to_mlx(folder, tmp_path / "mixed", Wanted(bits=8, expert_bits=3))
    convert_to_mlx(folder, tmp_path / "experts", Wanted(expert_bits=4))
    plain = parameters(folder)
    for name, bits in (("mixed", 3), ("experts", 4)):
        found = parameters(tmp_path / name)
        up, attention = "model.layers.0.mlp.switch_mlp.up_proj", "model.layers.0.self_attn.q_proj"
        packed, scales, biases = mx.quantize(plain[f"{up}.weight"], 64, bits)
        assert mx.array_equal(found[f"{up}.weight"], packed) and mx.array_equal(found[f"{up}.scales"], scales)
        assert mx.array_equal(found[f"{up}.biases"], biases)
        assert (f"{attention}.scales" in found) == (name == "mixed")
        model, streamer = open_streamed(tmp_path / name, 3)
        assert_same(everything(model), everything(load_model(tmp_path / name)[0]), name)
        streamer.close()


def to_fp8(folder: Path) -> None:
    """Rewrites a checkpoint's experts as FP8 in blocks of 128, with their scales, as some are published."""
    path = folder / "model.safetensors"
    weights: Any = mx.load(str(path))
    result = {}
    for name, array in weights.items():
        result[name] = array
        if ".experts." in name and "shared" not in name:
            result[name] = mx.to_fp8(array * 4)
            result[name.replace(".weight", ".weight_scale_inv")] = mx.full((1, 1), 0.25)
    mx.eval(result)
    path.unlink()
    mx.save_safetensors(str(path), result)
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


@pytest.mark.parametrize("bits", [16, 4])
def test_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """mlx-lm computes the experts, so they are refused as they are. They are converted one at a time."""
    folder = published(tmp_path / "original", "deepseek_v3")
    to_fp8(folder)
    with pytest.raises(UnsupportedModelError, match="mlxflash convert --model"):
        open_in_place(folder)
    shapes: list[tuple[int, ...]] = []
    real = mx.eval

    def noting(*arrays: Any) -> None:
        shapes.extend(array.shape for array in arrays if isinstance(array, mx.array) and array.dtype == mx.bfloat16)
        real(*arrays)

    monkeypatch.setattr(mx, "eval", noting)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    convert_to_mlx(folder, tmp_path / "mlx", Wanted(bits=bits))
    assert mx.get_peak_memory() - before < 200_000, "half of the experts"
    monkeypatch.undo()
    assert (64, 64) in shapes and (8, 64, 64) not in shapes
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    expected = parameters(folder)
    if bits == 16:
        assert "quantization_config" not in config
        assert_equal(parameters(tmp_path / "mlx"), expected)
    else:
        found = parameters(tmp_path / "mlx")
        name = "model.layers.1.mlp.switch_mlp.up_proj"
        assert mx.array_equal(found[f"{name}.weight"], mx.quantize(expected[f"{name}.weight"], 64, 4)[0])
        assert config["quantization"]["bits"] == 4
    open_in_place(tmp_path / "mlx")


def test_a_dense_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_mixture(tmp_path / "original", "llama", mlp_bias=False)
    write_tokenizer(folder, VOCABULARY)
    mlx_lm.convert(str(folder), str(tmp_path / "theirs"), quantize=True, q_bits=8)
    capsys.readouterr()
    convert_to_mlx(folder, tmp_path / "ours", Wanted(bits=8))
    assert_equal(parameters(tmp_path / "ours"), parameters(tmp_path / "theirs"))
    with pytest.raises(UsageError, match="needs no conversion: it is already in the form that runs"):
        convert_to_mlx(folder, tmp_path / "again", Wanted())
    with pytest.raises(UsageError, match="has no matrix to quantise"):
        convert_to_mlx(tmp_path / "ours", tmp_path / "again", Wanted(bits=4))
    assert not list(tmp_path.glob("again*")) and "INFO" not in capsys.readouterr().out


def test_shards_and_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A conversion that was stopped continues with the file that it was writing."""
    folder = published(tmp_path / "original", "qwen3_moe")
    monkeypatch.setattr(mlx_form, "SHARD_BYTES", 60_000)
    convert_to_mlx(folder, tmp_path / "whole", Wanted(bits=4))
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    real = mlx_form.write_safetensors

    def stop_at_third(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == names[2]:
            raise KeyboardInterrupt
        return real(path, *arguments, **options)

    monkeypatch.setattr(mlx_form, "write_safetensors", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        convert_to_mlx(folder, tmp_path / "mlx", Wanted(bits=4))
    assert not (tmp_path / "mlx").exists()
    partial = tmp_path / "mlx.partial"
    assert not (partial / "config.json").exists() and not (partial / "model.safetensors.index.json").exists()
    written: list[str] = []

    def noting(path: Path, *arguments: Any, **options: Any) -> Any:
        written.append(path.name)
        return real(path, *arguments, **options)

    monkeypatch.setattr(mlx_form, "write_safetensors", noting)
    with (partial / names[1]).open("r+b") as file:  # as a faulty disk
        file.seek(-1, 2)
        file.write(b"\x99")
    convert_to_mlx(folder, tmp_path / "mlx", Wanted(bits=4))
    assert written == names[1:] and "continuing the conversion" in capfd.readouterr().err
    for path in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "mlx" / path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(p.name for p in (tmp_path / "mlx").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )
    assert not partial.exists()


def test_what_is_copied(tmp_path: Path) -> None:
    folder = published(tmp_path / "original", "qwen3_moe")
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    (folder / "quantize_config.json").write_text("{}")
    (folder / "own.py").write_text("raise SystemExit")
    convert_to_mlx(folder, tmp_path / "mlx", Wanted(bits=8))
    names = {path.name for path in (tmp_path / "mlx").iterdir()}
    assert {"tokenizer.json", "generation_config.json", "config.json", "model.safetensors.index.json"} <= names
    assert not names & {"quantize_config.json", "own.py", "conversion.json", "checksums.jsonl"}


def test_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = published(tmp_path / "original", "qwen3_moe")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("")
    with pytest.raises(UsageError, match="is a folder with other files in it"):
        convert_to_mlx(folder, tmp_path / "taken", Wanted(bits=4))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    with pytest.raises(NoSpaceError, match=r"the converted checkpoint needs 0\.\d+ GB more"):
        convert_to_mlx(folder, tmp_path / "mlx", Wanted(bits=4))
    monkeypatch.undo()
    real = mlx_form.read_at

    def cut(file: Any, offset: int, target: np.ndarray) -> None:
        if offset > 100_000:
            raise EOFError("it ends at byte 100000")
        real(file, offset, target)

    monkeypatch.setattr(mlx_form, "read_at", cut)
    with pytest.raises(ConversionError, match=r"model\.safetensors: tensor .* cannot be read: it ends at byte 100000"):
        convert_to_mlx(folder, tmp_path / "mlx", Wanted(bits=4))


@pytest.mark.parametrize("replaced", [False, True])
def test_a_checkpoint_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaced: bool) -> None:
    """Part of the output would be made of the old bytes, and part of the new ones."""
    folder = published(tmp_path / "original", "qwen3_moe")
    file, other = folder / "model.safetensors", tmp_path / "other"
    content = file.read_bytes()
    other.write_bytes(content[:-4096] + bytes(4096))
    real, reads = mlx_form.read_at, []

    def change(*arguments: Any) -> None:
        real(*arguments)
        reads.append(1)
        if len(reads) == 3:
            if replaced:
                other.replace(file)
            else:
                file.write_bytes(other.read_bytes())

    monkeypatch.setattr(mlx_form, "read_at", change)
    with pytest.raises(ConversionError, match=r"model\.safetensors changed or vanished while it was converted"):
        convert_to_mlx(folder, tmp_path / "mlx", Wanted(bits=4))
    assert not (tmp_path / "mlx").exists()
    convert_to_mlx(folder, tmp_path / "mlx", Wanted(bits=4))
    convert_to_mlx(folder, tmp_path / "again", Wanted(bits=4))
    found, expected = parameters(tmp_path / "mlx"), parameters(tmp_path / "again")
    assert_equal(found, expected)


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("qwen3_moe", ["--resident-bits", "4"], "--resident-bits is for ReLU models, which .* is not. Leave it out"),
        ("qwen3_moe", ["--predictor-memory", "1MB"], "--predictor-memory is for ReLU models"),
        ("qwen3_moe", [], "needs no conversion: it is already in the form that runs"),
        ("mixtral", ["--bits", "4"], ""),
    ],
)
def test_the_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    family: str,
    arguments: list[str],
    message: str,
) -> None:
    folder = published(tmp_path / "original", family)
    command_line = ["convert", "--model", str(folder), "--output", str(tmp_path / "mlx"), *arguments]
    monkeypatch.setattr(sys, "argv", command_line)
    with pytest.raises(SystemExit) as exit:
        run_command(command.make_parser(), command.main)
    said = capsys.readouterr().err
    if message:
        assert exit.value.code == 2 and re.search(message, said)
    else:
        assert not exit.value.code and "GB in MLX's form" in said
        assert "note: the parts for images are left out" not in said
        open_in_place(tmp_path / "mlx")


def test_parts_for_images_are_left_out_with_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = published(tmp_path / "original", "gpt_oss")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": {"depth": 2}}))
    monkeypatch.setattr(sys, "argv", ["convert", "--model", str(folder), "--output", str(tmp_path / "mlx")])
    with pytest.raises(SystemExit) as exit:
        run_command(command.make_parser(), command.main)
    assert not exit.value.code and "note: the parts for images are left out" in capsys.readouterr().err
