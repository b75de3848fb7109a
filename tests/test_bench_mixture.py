"""The synthetic mixture: what is planted holds, mlx-lm reads it; and the comparison's sides agree."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_flash.bench import __main__ as bench
from mlx_flash.bench.synthetic_mixture import REPEATED, SHAPES, popularity, write_mixture
from mlx_flash.layers import experts as layer_module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "tiny"
    write_mixture(folder, SHAPES["tiny"], 3, mx.float32, seed=0)
    return folder


def test_popularity_repeats_as_many_choices_as_were_published() -> None:
    for experts, choices in ((128, 8), (32, 4)):
        rng = np.random.default_rng(1)
        bias = popularity(experts, choices, REPEATED, rng)
        scores = bias + np.random.default_rng(2).standard_normal((2000, experts))
        chosen = np.sort(np.argpartition(-scores, choices, axis=1)[:, :choices], axis=1)
        repeated = np.mean([len(np.intersect1d(a, b)) / choices for a, b in zip(chosen[1:], chosen[:-1], strict=True)])
        assert abs(repeated - REPEATED) < 0.04


def test_the_model_routes_as_planted(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layer, measured on the whole model as mlx-lm computes it."""
    from mlx_lm.models.switch_layers import SwitchGLU

    model, config = load_model(checkpoint)
    seen: list[np.ndarray] = []
    call = SwitchGLU.__call__

    def noting(self: SwitchGLU, x: mx.array, indices: mx.array) -> mx.array:
        seen.append(np.array(indices)[0])
        return call(self, x, indices)

    monkeypatch.setattr(SwitchGLU, "__call__", noting)
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], 400)
    logits = model(mx.array(ids)[None], cache=make_prompt_cache(model))
    assert np.isfinite(np.array(logits)).all() and len(seen) == 3
    for chosen in seen:
        pairs = zip(chosen[1:], chosen[:-1], strict=True)
        repeated = np.mean([len(np.intersect1d(a, b)) / chosen.shape[1] for a, b in pairs])
        assert abs(repeated - REPEATED) < 0.15


def test_sides_agree(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["mixture", "--model", str(checkpoint), "--memory", "1GB", "--tokens", "4", "--baseline-tokens", "2"]
    arguments += ["--prompt", "9", "--sides", "resident,naive,flash", "--no-cgroup", "--output", str(tmp_path)]
    parsed = bench.make_parser().parse_args(arguments)
    bench.main(parsed)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    resident, naive, flash = result["rows"]
    assert flash["likeliest"] == resident["likeliest"] and naive["likeliest"] == resident["likeliest"][:3]
    assert naive["mean"]["bytes"] >= result["experts_bytes"] > flash["mean"]["bytes"] >= 0
    assert (tmp_path / "mixture.png").stat().st_size > 10_000


def test_the_products_are_mlx_lms() -> None:
    """The pairs are sorted from as many on as there: else its bits were not ours on every backend."""
    import inspect

    from mlx_lm.models import switch_layers

    for layer in (switch_layers.SwitchGLU, switch_layers.SwitchMLP):
        assert f"indices.size >= {layer_module.SORTED_FROM}" in inspect.getsource(layer.__call__)
