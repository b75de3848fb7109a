"""The doors to the zoos: no code of a checkpoint, no import of a zoo for nothing. mlx-vlm is not needed here."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mixtures import FAMILIES, config_of, make_mixture, open_streamed  # type: ignore[import-not-found]

from mlx_flash.errors import UnsupportedModelError
from mlx_flash.loading.cache_growth import counts_of, enlarge
from mlx_flash.loading.graph_memory import trace
from mlx_flash.source import zoos
from mlx_flash.source.model_kind import is_switch_layer, switch_layers
from mlx_flash.source.remote_code import refusing_remote_code


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder whose files name classes in its own.py, which leaves RUN beside it when it is run."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    write_tokenizer(folder)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'RUN')!r}, 'w').close()\nclass Own: pass\n")
    kinds = ("AutoConfig", "AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor", "AutoVideoProcessor")
    own: dict[str, Any] = {name: "own.Own" for name in kinds}
    for name in ("config", "preprocessor_config", "processor_config", "video_preprocessor_config"):
        (folder / f"{name}.json").write_text(json.dumps({"model_type": "made_up", "auto_map": own}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = own | {"AutoTokenizer": ["own.Own", "own.Own"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("kind", ["AutoConfig", "AutoTokenizer", "AutoProcessor", "AutoFeatureExtractor"])
def test_transformers_runs_no_code_whatever_it_is_told(hostile: Path, kind: str) -> None:
    import transformers

    with refusing_remote_code(), pytest.raises(UnsupportedModelError, match="code from a checkpoint is never run"):
        getattr(transformers, kind).from_pretrained(str(hostile), trust_remote_code=True)
    assert not (hostile.parent / "RUN").exists()


def test_other_threads_are_left_alone(hostile: Path) -> None:
    """A program that trusts a checkpoint itself can still do so, beside our thread."""
    import transformers

    def trust() -> None:
        transformers.AutoTokenizer.from_pretrained(str(hostile), trust_remote_code=True)

    with refusing_remote_code():
        other = threading.Thread(target=lambda: _ignoring(trust))
        other.start()
        other.join()
    assert (hostile.parent / "RUN").exists()


def _ignoring(call: Any) -> None:
    try:
        call()
    except Exception:  # the class in own.py is not a tokenizer
        return


def test_a_type_that_only_the_second_zoo_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoos, "mlx_vlm_is_installed", lambda: False)
    assert zoos.zoo_of({"model_type": "made_up"}) is None
    assert zoos.random_model({"model_type": "made_up"}) is None
    assert zoos.zoo_of(config_of("mixtral")) == zoos.MLX_LM


@pytest.mark.parametrize("family", FAMILIES)
def test_switch_layers_are_those_of_the_zoo(family: str) -> None:
    from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

    model: Any = zoos.random_model(config_of(family))
    own = [path for path, module in model.named_modules() if isinstance(module, (SwitchGLU, SwitchMLP))]
    assert own and sorted(own) == sorted(path for path, _ in switch_layers(model))


def test_what_is_not_a_switch_layer() -> None:
    class Convolutions(nn.Module):  # weights of three axes, but no indices
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3)

        def __call__(self, x: mx.array, length: int) -> mx.array:
            return self.second(self.first(x))[:, :length]

    assert not is_switch_layer(Convolutions())
    assert not is_switch_layer(nn.MultiHeadAttention(8, 2))


def test_a_cache_is_enlarged_as_it_grew() -> None:
    """In proportion to the tokens, along any axis; what did not grow stays."""
    cache = SimpleNamespace(pooled=mx.zeros((1, 64, 8)), window=mx.zeros((1, 2, 16, 4)), offset=256, ratio=4)

    def arrays(part: Any) -> Any:
        names = ("pooled", "window")
        return [(getattr(part, name), lambda array, name=name: setattr(part, name, array)) for name in names]

    before = SimpleNamespace(offset=128, ratio=4)
    enlarge([cache], arrays, [counts_of(before)], [[(1, 32, 8), (1, 2, 16, 4)]], (128, 256, 1001))
    assert cache.pooled.shape == (1, 251, 8) and cache.window.shape == (1, 2, 16, 4)
    assert (cache.offset, cache.ratio) == (1001, 4)


def test_a_model_that_reads_numbers_back_is_traced() -> None:
    """Its tokens' numbers are not known then, and count as 0."""
    read: list[Any] = []

    def model(table: mx.array, ids: mx.array) -> list[mx.array]:
        mx.eval(ids)
        read.extend([ids.tolist(), ids.sum().item()])
        return [table[mx.array(read[0])] * 2]

    graph = trace(model, mx.zeros((5, 3)), mx.zeros((2, 2), mx.int32))
    assert read == [[[0, 0], [0, 0]], 0]
    assert graph.outputs[0].shape == (2, 2, 3)
    assert mx.array([4]).tolist() == [4], "only while it is traced"


def test_a_router_with_a_number_for_no_expert(tmp_path: Path) -> None:
    model, streamer = open_streamed(make_mixture(tmp_path / "mixture", "mixtral"), 2)
    layer = model.layers[0].block_sparse_moe.switch_mlp
    with pytest.raises(UnsupportedModelError, match="chose expert 6, but its layer has only 6"):
        layer(mx.zeros((1, 1, 64)), mx.array([[[1, 6]]]))
    streamer.close()
