"""A config.json with a count of a billion is refused before a model is built from it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN, GOLDEN_VARIANTS  # type: ignore[import-not-found]
from golden_models import config_of as golden_config  # type: ignore[import-not-found]
from hypothesis import given
from hypothesis import strategies as st
from mixtures import FAMILIES, config_of, make_mixture  # type: ignore[import-not-found]
from mlx_lm.utils import _get_classes

from mlx_flash.source.checkpoint_tensors import extent_of
from mlx_flash.source.config_counts import FEW, count_problem

BILLION = 10**9

# Runs the cases in turn, in one process that may use 3 GB of address space beyond its imports.
CHILD = """
import json, resource, sys
from pathlib import Path
from mlx_flash.loading import load as loading
from mlx_flash.convert.conversion import Settings, convert
from mlx_flash.errors import FlashError
import mlx.core, mlx.nn, mlx_lm.utils, mlx_lm.models.qwen3_moe, mlx_lm.models.llama, transformers
size = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (size + (3 << 30),) * 2)
for line in sys.stdin:
    kind, folder = json.loads(line)
    try:
        if kind == "load":
            loading.load(folder, memory="1GB")
        else:
            convert(Path(folder), Path(folder + "-store"), Settings(calibration_tokens=64))
        print(json.dumps("nothing was said"))
    except FlashError as error:
        print(json.dumps(f"{type(error).__name__}: {error}"))
    except BaseException as error:
        print(json.dumps(f"not a sentence: {error!r:.300}"))
    sys.stdout.flush()
"""


def with_config(source: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(source, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if (folder / "manifest.json").exists():
        from conftest import change_manifest

        change_manifest(folder)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="counts addresses as Linux does")
def test_a_billion_layers_in_a_process_with_little_memory(store: Path, tmp_path: Path) -> None:
    mixture = make_mixture(tmp_path / "mixture", "qwen3_moe")
    cases: list[tuple[str, Path, str]] = []
    of_mixtures: tuple[dict[str, Any], ...] = (
        {"num_hidden_layers": BILLION},
        {"layer_types": ["full_attention"] * 10_000},
        {"text_config": {"n_layer": BILLION}},
        {"num_experts": BILLION},
        {"model_type": "gpt2", "n_layer": BILLION, "n_ctx": 64, "n_embd": 64, "n_head": 4, "n_positions": 64}
        | {"layer_norm_epsilon": 1e-5},
    )
    for number, changes in enumerate(of_mixtures):
        cases.append(("load", with_config(mixture, tmp_path / f"mixture-{number}", **changes), "CheckpointError"))
    cases.append(("load", with_config(store, tmp_path / "store", num_hidden_layers=BILLION), "CorruptStoreError"))
    for variant in GOLDEN_VARIANTS:
        folder = with_config(GOLDEN / variant, tmp_path / variant, num_hidden_layers=BILLION)
        cases.append(("convert", folder, "CheckpointError"))
    folder = with_config(GOLDEN / "llama-relu", tmp_path / "load", num_hidden_layers=BILLION)
    cases.append(("load", folder, "CheckpointError"))
    lines = "".join(json.dumps([kind, str(folder)]) + "\n" for kind, folder, _ in cases)
    done = subprocess.run([sys.executable, "-c", CHILD], input=lines, capture_output=True, text=True)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(said) == len(cases), done.stderr[-2000:]
    for sentence, (kind, folder, error) in zip(said, cases, strict=True):
        assert sentence.startswith(f"{error}: {folder / 'config.json'} does not describe this "), (kind, sentence)
        assert sentence.endswith("again.") and "the checkpoint" in sentence


@pytest.mark.parametrize(
    "key",
    [
        *("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth", "decoder_layers", "encoder_layers"),
        *("num_nextn_predict_layers", "n_blocks", "num_attention_heads", "n_head", "n_routed_experts", "num_experts"),
    ],
)
@pytest.mark.parametrize("nest", [lambda c: c, lambda c: {"vision_config": c}, lambda c: {"parts": [c, {"x": c}]}])
def test_every_way_to_say_it(key: str, nest: Any) -> None:
    for value in (BILLION, 1e9, FEW + 1):
        assert key in str(count_problem(nest({key: value}), 30, 64))
    for harmless in (FEW, 0, -1, True, None, "many", 1.5):
        assert count_problem(nest({key: harmless}), 30, 64) is None
    assert count_problem(nest({key: 1000}), 1000, 1000) is None


@pytest.mark.parametrize(
    "config",
    [
        {"layer_types": ["full_attention"] * (FEW + 1)},
        {"hybrid_override_pattern": "M" * (FEW + 1)},
        {"layers_block_type": ["mamba"] * (FEW + 1)},
        {"block_configs": [{}] * (FEW + 1)},
        {"mlp_only_layers": list(range(FEW + 1))},
    ],
)
def test_long_lists(config: dict[str, Any]) -> None:
    assert "items, and the checkpoint has 30 tensors" in str(count_problem(config, 30, 10**6))
    assert count_problem(config, FEW + 1, 64) is None


def test_deep_nesting() -> None:
    config: dict[str, Any] = {}
    for _ in range(200):
        config = {"text_config": config}
    assert "nested more than" in str(count_problem(config, 30, 64))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("layers"), inner)))  # fmt: skip
def test_no_configuration_makes_it_fail(config: Any) -> None:
    assert isinstance(count_problem(config, 10, 10), str | None)


def test_real_configurations_pass(tmp_path: Path) -> None:
    """Uses the tests' configurations. Larger models have more tensors and dimensions, but not larger other counts."""
    for family in FAMILIES:
        make_mixture(tmp_path / family, family)
        extent = extent_of(tmp_path / family)
        assert count_problem(config_of(family), extent.tensors, extent.longest) is None
    for variant in GOLDEN_VARIANTS:
        extent = extent_of(GOLDEN / variant)
        assert count_problem(golden_config(variant) | {"max_window_layers": 70}, extent.tensors, extent.longest) is None
    assert _get_classes(config_of("mixtral"))
