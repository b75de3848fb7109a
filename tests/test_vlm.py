"""Mixtures that mlx-vlm builds, against mlx-vlm with everything in memory: the same bits with every number of slots."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mixtures import VOCABULARY, open_streamed  # type: ignore[import-not-found]
from ranked_mixture import ranked  # type: ignore[import-not-found]
from test_kernel_choice import Recorder  # type: ignore[import-not-found]
from test_mixture import PROMPT, assert_same  # type: ignore[import-not-found]
from vlm_mixtures import TYPES, make_vlm_mixture  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.errors import UnsupportedModelError
from mlx_flash.layers import experts as layer_module
from mlx_flash.loading import memory_needs
from mlx_flash.loading.in_place_loading import streamed_layers
from mlx_flash.loading.in_place_model import open_in_place
from mlx_flash.source.model_kind import is_mixture
from mlx_flash.source.remote_code import refusing_remote_code
from mlx_flash.source.zoos import MLX_LM, MLX_VLM, mlx_vlm_module, zoo_of

pytestmark = [
    pytest.mark.vlm,
    pytest.mark.usefixtures("one_processor"),
    pytest.mark.filterwarnings("ignore"),  # other people's
]
pytest.importorskip("mlx_vlm")

CALLS = [PROMPT, [4], [9], [77, 31], [6], [12, 4, 50], [9]]  # a prompt, single tokens, a few tokens at once


@pytest.fixture(scope="module")
def mixture_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @functools.cache
    def make(model_type: str, quantisation: str = "plain") -> Path:
        return make_vlm_mixture(tmp_path_factory.mktemp(model_type), model_type, quantisation)

    return make


def answers(model: Any) -> list[np.ndarray]:
    cache = model.make_cache()
    return [np.array(model(mx.array([tokens]), cache=cache)) for tokens in CALLS]


def resident(folder: Path) -> list[np.ndarray]:
    """The logits of mlx-vlm's own model, loaded as a whole by its own loader."""
    from mlx_vlm.models.cache import make_prompt_cache
    from mlx_vlm.utils import load_model

    text = load_model(folder).language_model
    cache = make_prompt_cache(text)
    return [np.array(text(mx.array([tokens]), cache=cache).logits) for tokens in CALLS]


@pytest.mark.parametrize("quantisation", ["plain", "4 bits"])
@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_has_the_bits_of_mlx_vlm(
    mixture_of: Callable[..., Path], model_type: str, quantisation: str
) -> None:
    """One slot, a quarter, all."""
    folder = mixture_of(model_type, quantisation)
    expected = resident(folder)
    for slots in (1, 3, 12) if quantisation == "plain" else (2, 12):
        model, streamer = open_streamed(folder, slots, zoo=MLX_VLM)
        assert_same(answers(model), expected, slots)
        assert streamer.counters.bytes > 0
        streamer.close()


@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_has_the_same_bits_over_ranks(mixture_of: Callable[..., Path], model_type: str) -> None:
    folder = mixture_of(model_type, "4 bits")
    expected, mixture = resident(folder), open_in_place(folder, zoo=MLX_VLM)
    for weights, slots in (([1, 1], 1), ([1, 2, 1], 2), ([2, 1, 1, 1], 12)):
        with ranked(mixture, weights, slots) as found:
            assert_same(answers(found.model), expected, (weights, slots))
            assert found.group.calls_made and found.everything_read


@pytest.mark.parametrize("model_type", [t for t in TYPES if t != "gemma4"])
def test_a_type_is_loaded_within_a_budget(mixture_of: Callable[..., Path], model_type: str) -> None:
    """The plan comes from the model's own graph, though some models read numbers back while they compute."""
    folder = mixture_of(model_type)
    write_tokenizer(folder)
    model, tokenizer = mlx_flash.load(folder, context=600)
    tokens = [r.token for r in mlx_flash.stream_generate(model, tokenizer, PROMPT * 22, max_tokens=6)]
    model.flash.close()
    assert tokens and model.flash.plan.context == 600


@pytest.mark.parametrize("model_type", ["qwen4_exp", "deepseek_v4", "glm5_next", "gemma4", "minimax_m3_vl"])
def test_a_cache_is_planned_as_it_grows(mixture_of: Callable[..., Path], model_type: str) -> None:
    """Compares the planned prompt cache with one that is filled token by token, in pieces as a prompt's."""
    mixture = open_in_place(mixture_of(model_type), zoo=MLX_VLM)
    tokens = 4 * 512
    with memory_needs.stand_ins(streamed_layers(mixture)) as calls:
        planned = memory_needs._filled_cache(mixture.model, calls, tokens)
        real = mixture.model.make_cache()
        for piece in (512, 512, 512, 512):
            calls.begin([])
            mixture.model(mx.zeros((1, piece), mx.int32), cache=real)
    for ours, theirs in zip(memory_needs.parts_of(planned), memory_needs.parts_of(real), strict=True):
        found = [a.nbytes for a, _ in memory_needs._arrays_of(ours)]
        wanted = [a.nbytes for a, _ in memory_needs._arrays_of(theirs)]
        assert found == wanted and sum(wanted) > 0
        assert getattr(ours, "offset", 0) == getattr(theirs, "offset", 0)


@pytest.mark.parametrize("model_type", ["hy_v4", "minimax_m3_vl", "qwen4_exp"])
def test_products_on_metal_do_not_depend_on_the_budget(
    mixture_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Also where gate and up are one projection, and where few pairs are sorted already."""
    monkeypatch.setattr(layer_module, "kernels_vary", lambda: True)
    monkeypatch.setattr(layer_module, "is_widened", lambda *_: False)
    folder = mixture_of(model_type, "4 bits")
    expected = None
    for slots in (2, 5, 12):
        model, streamer = open_streamed(folder, slots, zoo=MLX_VLM)
        for layer in model.modules():
            if isinstance(layer, layer_module.StreamedExperts):
                layer.ahead = None
        with monkeypatch.context() as patched:
            recorder = Recorder(patched)
            for _ in range(2):
                cache = model.make_cache()
                for call in [PROMPT, [4], [9, 8], [12, 4, 50, 3, 9, 8, 7, 6, 5, 4]]:
                    mx.eval(model(mx.array([call]), cache=cache))
                products = recorder.take()
                expected = products if expected is None else expected
                assert products == expected, slots
        streamer.close()


@pytest.mark.parametrize("model_type", ["hy_v4", "minimax_m3_vl", "deepseek_v4"])
def test_expert_by_expert_is_what_mlx_vlm_computes(
    mixture_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    folder = mixture_of(model_type, "4 bits")
    expected = resident(folder)
    monkeypatch.setattr(layer_module, "kernels_vary", lambda: True)
    for slots in (2, 12):
        model, streamer = open_streamed(folder, slots, zoo=MLX_VLM)
        assert_same(answers(model), expected, slots)
        streamer.close()


def test_mlx_lm_builds_what_it_has(mixture_of: Callable[..., Path]) -> None:
    for model_type in ("qwen3_vl_moe", "gemma4", "qwen4_exp"):
        config = json.loads((mixture_of(model_type) / "config.json").read_text())
        assert zoo_of(config) == (MLX_VLM if model_type == "qwen4_exp" else MLX_LM)
        assert is_mixture(config, "here")
    assert zoo_of({"model_type": "no_such_type"}) is None
    assert zoo_of({"model_type": "siglip"}) is None or not is_mixture({"model_type": "siglip"}, "here")


def test_a_text_reads_no_vision_weights(mixture_of: Callable[..., Path]) -> None:
    mixture = open_in_place(mixture_of("qwen4_exp"))
    names = [name for name, _ in mixture.resident()]
    assert names and all(name.startswith("language_model.") for name in names)
    assert any(name.startswith("vision_tower.") for name in mixture.tensors)


def test_a_long_text_after_a_shorter_one_begins_at_the_first_position(mixture_of: Callable[..., Path]) -> None:
    """mlx-vlm's text models keep the positions of the last prompt."""
    model, streamer = open_streamed(mixture_of("qwen4_exp"), 12)
    first = np.array(model(mx.array([PROMPT]), cache=model.make_cache()))
    model.language_model._position_ids = mx.full((3, 1, 40), 7)
    model.language_model._rope_deltas = mx.array([[5]])
    assert np.array_equal(first, np.array(model(mx.array([PROMPT]), cache=model.make_cache())))
    streamer.close()


@pytest.mark.parametrize("architectures", [1.5, [["x"]], {"x": 1}])
def test_architectures_that_are_none(architectures: object) -> None:
    mlx_vlm_module({"model_type": "qwen3_vl_moe", "architectures": architectures})  # raises nothing


def test_a_processor_that_trusts_code_runs_none(tmp_path: Path) -> None:
    """mlx-vlm passes trust_remote_code=True to transformers for this type."""
    from mlx_vlm.utils import load_processor

    folder = tmp_path / "hostile"
    folder.mkdir()
    write_tokenizer(folder, VOCABULARY)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'RUN')!r}, 'w').close()\nclass Own: pass\n")
    own = {name: "own.Own" for name in ("AutoConfig", "AutoProcessor", "AutoImageProcessor", "AutoTokenizer")}
    (folder / "config.json").write_text(json.dumps({"model_type": "made_up", "auto_map": own}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": own, "image_processor_type": "Own"}))
    (folder / "processor_config.json").write_text(json.dumps({"auto_map": own, "processor_class": "Own"}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    changed = {**settings, "auto_map": {"AutoTokenizer": ["own.Own", None], "AutoProcessor": "own.Own"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(changed))
    with refusing_remote_code(), pytest.raises(UnsupportedModelError, match="never run"):
        load_processor(folder, trust_remote_code=True)
    assert not (tmp_path / "RUN").exists()
