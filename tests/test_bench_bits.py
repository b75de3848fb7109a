"""The commands on bits run and print what they promise. No test checks how fast anything is."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Tiny  # type: ignore[import-not-found]

from mlx_flash.bench import bits
from mlx_flash.bench import plan_shape as bench_plan
from mlx_flash.bench.__main__ import make_parser
from mlx_flash.convert.conversion import Settings
from mlx_flash.convert.fitting import shadow_bytes
from mlx_flash.errors import BudgetError, UsageError
from mlx_flash.flash.files import NeuronLayout

pytestmark = pytest.mark.usefixtures("one_processor")


def run(*flags: object) -> None:
    arguments = make_parser().parse_args(list(map(str, flags)))
    arguments.run(arguments)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_stores_side_by_side(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bits, "Settings", partial(Settings, calibration_tokens=256))
    text = tmp_path / "text.txt"
    text.write_text("It was a dark night, and the old dog slept beside the fire. " * 8)
    flags = ("--model", tiny.checkpoint, "--text", text, "--tokens", 64, "--timed", 6)
    run("bits", *flags, "--stores", "16,4/8", "--groups", "64")
    result = last_line(capsys)
    plain, four = result["rows"]
    assert [plain[key] for key in ("bits", "resident_bits", "group_size", "row_bits")] == [16, 16, 0, 32]
    assert [four[key] for key in ("bits", "resident_bits", "group_size", "row_bits")] == [4, 8, 64, 5]
    assert plain["store_bytes"] > 2 * four["store_bytes"]  # scales and biases are in float32
    assert 0 < abs(four["perplexity"] / plain["perplexity"] - 1) < 0.5
    for row in result["rows"]:
        assert row["seconds"]["median"] > 0 and row["bytes_per_token"] >= 0 and 0.28 < row["slot_share"] < 0.38
    for flag, value in (("--groups", "48"), ("--text", tmp_path / "none")):
        with pytest.raises(UsageError, match=flag):
            run("bits", *flags, flag, value)
    with pytest.raises(SystemExit):
        run("bits", *flags, "--stores", "5")
    with pytest.raises(UsageError, match="cannot be stored in any of these ways"):
        run("bits", *flags, "--stores", "4", "--groups", "128")
    text.write_text("Too short.")
    with pytest.raises(UsageError, match="--text has 10 tokens"):
        run("bits", *flags, "--stores", "16")


def test_a_plan_from_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("plan", "--shape", "125m", "--bits", "4", "--resident-bits", "8")
    run(*flags, "--memory", "1GB")
    made = last_line(capsys)
    kinds = ("process", "resident_weights", "predictors", "slots", "kv_cache", "prompt_caches", "drafts", "workspace")
    assert made["total"] == sum(made[kind] for kind in kinds) <= made["budget"] == 10**9
    assert made["slot_bytes"] == 864  # 2 x (768 / 2 + 768 / 64 x 2 x 2)
    with pytest.raises(BudgetError, match="this model needs at least"):
        run(*flags, "--memory", "100MB")


def test_the_plan_counts_what_a_conversion_stores(tiny_of: Any) -> None:
    for name in ("float16", "4 bits"):
        tiny: Tiny = tiny_of(name)
        config = json.loads((tiny.checkpoint / "config.json").read_text())
        manifest = tiny.manifest
        header = len((tiny.store / "model.safetensors").read_bytes()) - int.from_bytes(
            (tiny.store / "model.safetensors").read_bytes()[:8], "little"
        )
        assert sum(bench_plan.resident_sizes(config, manifest.resident_bits)) == header - 8
        layout = manifest.layout
        assert shadow_bytes(layout, 3) == manifest.predictors["shadow"]["bytes"]


def test_layouts_of_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(np.random.default_rng(0).bytes(1 << 20))
    run("blocks", "--file", path, "--width", 4096, "--neurons", 64, "--percent", 20, "--rounds", 3)
    result = last_line(capsys)
    assert result["bundle_bytes"] == NeuronLayout.plan("float16", 1, 64, 4096, ("up", "down"), 4).bundle_bytes == 4608
    ways = {(row["block"], row["block_bytes"]) for row in result["rows"]}
    assert {("padded", 8192), ("padded", 12288), ("tight", 4608)} <= ways
    for row in result["rows"]:
        assert row["bytes"] > 0 and row["seconds"]["median"] > 0
    with pytest.raises(UsageError, match="Raise --size"):
        run("blocks", "--file", path)
