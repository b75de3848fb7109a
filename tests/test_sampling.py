"""Default sampling: generation_config.json, arguments and OpenAI's defaults."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.sample_utils import make_sampler as make_mlx_lm_sampler

from mlx_flash.errors import CheckpointError, CorruptStoreError
from mlx_flash.loading.load import load
from mlx_flash.server.apis.openai_chat import ChatRequest
from mlx_flash.server.apis.openai_common import parse
from mlx_flash.text.generation_config import MOST_BYTES, GenerationConfig, read_generation_config
from mlx_flash.text.sampling import Sampling, add_sampling_arguments, check_sampling, make_sampler, sampling_of

FILE: dict[str, Any] = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [2, 5]}


def config_of(folder: Path, content: Any) -> GenerationConfig:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "generation_config.json").write_text(text)
    return read_generation_config(folder)


def sampling_with(config: GenerationConfig, *arguments: str) -> Sampling:
    parser = argparse.ArgumentParser()
    add_sampling_arguments(parser, 10)
    parsed = parser.parse_args(arguments)
    check_sampling(parsed)
    return sampling_of(parsed, config)


def asked(config: GenerationConfig, **fields: Any) -> Sampling:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return parse(ChatRequest, json.dumps(body).encode()).sampling(300, config)


def test_the_model_s_settings_hold_where_nothing_is_said(tmp_path: Path) -> None:
    config = config_of(tmp_path, FILE | {"repetition_penalty": 1.1, "min_p": None, "other": [{}]})
    model = Sampling(temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.1)
    assert sampling_with(config) == asked(config) == model
    assert sampling_with(config, "--temp", "0", "--top-k", "0").describe() == "greedy, repetition penalty 1.1"
    plain = {"temperature": 1, "top_p": 1, "top_k": -1, "repetition_penalty": 1}
    assert asked(config, **plain) == Sampling(repetition_penalty=1)
    assert asked(config, **dict.fromkeys(plain)) == model
    assert sampling_with(config).describe() == "temperature 0.6, top-p 0.95, top-k 20, repetition penalty 1.1"


@pytest.mark.parametrize("content", [{}, {"eos_token_id": 2, "pad_token_id": None}, {"temperature": None}])
def test_without_settings(tmp_path: Path, content: Any) -> None:
    for config in (config_of(tmp_path, content), read_generation_config(tmp_path / "nothing")):
        assert asked(config) == Sampling() and sampling_with(config) == Sampling(temperature=0)


def test_models_that_are_not_to_be_sampled(tmp_path: Path) -> None:
    config = config_of(tmp_path, FILE | {"do_sample": False})
    assert asked(config).greedy and sampling_with(config).greedy and not asked(config, temperature=1).greedy


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"temperature": "warm"}, "temperature is 'warm', expected a number from 0 to 1000"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": True}, "temperature is True"),
        ('{"temperature": NaN}', "temperature is nan"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 1.5}, "top_k is 1.5, expected a whole number"),
        ('{"top_k": Infinity}', "top_k is inf"),
        ({"top_k": 10**400}, "top_k is 1000"),
        ({"min_p": []}, r"min_p is \[\]"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"do_sample": "no"}, "do_sample is 'no', expected true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', expected a token id or a list of them"),
        ({"eos_token_id": [1, "a"]}, "eos_token_id is "),
        ({"eos_token_id": 1.5}, "eos_token_id is 1.5"),
        ([], "holds list, expected a JSON object"),
        ("{", "cannot be used: "),
        ("[" * 99999, "cannot be used: "),
        (" " * MOST_BYTES + "{}", "expected at most 1048576"),
    ],
)
def test_a_file_that_means_nothing_is_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        config_of(tmp_path, content)
    assert str(caught.value).startswith(str(tmp_path / "generation_config.json"))


def test_the_settings_are_those_of_the_model_that_is_loaded(own_store: Path) -> None:
    from conftest import change_manifest  # type: ignore[import-not-found]  # found beside this file

    (own_store / "generation_config.json").write_text(json.dumps(FILE))
    change_manifest(own_store)
    model, tokenizer = load(own_store)
    model.flash.close()
    assert model.flash.defaults.sampling == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    assert tokenizer.eos_token_ids >= {2, 5}
    (own_store / "generation_config.json").write_text("[]")
    with pytest.raises(CorruptStoreError, match=r"generation_config\.json: it holds .*, expected a JSON object"):
        load(own_store)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_samplers_are_mlx_lm_s_and_never_overflow(dtype: mx.Dtype) -> None:
    logits = mx.random.normal((1, 96), dtype=mx.float32, key=mx.random.key(1)) * 20
    logprobs = (logits - mx.logsumexp(logits, keepdims=True)).astype(dtype)
    likeliest = mx.argmax(logprobs).item()
    for greedy in (
        Sampling(temperature=0),
        Sampling(temperature=1e-8),
        Sampling(temperature=5e-324),
        Sampling(temperature=1e-3),
        Sampling(top_p=0),
        Sampling(temperature=2, top_p=1e-300),
        Sampling(temperature=2, top_k=1),
        Sampling(temperature=2, min_p=1),
    ):
        assert make_sampler(greedy, 96)(logprobs).item() == likeliest
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=30, min_p=0.01)
    for ours, theirs in (
        (make_sampler(sampling, 96), make_mlx_lm_sampler(0.7, 0.9, 0.01, top_k=30)),
        (make_sampler(Sampling(top_k=96), 96), make_mlx_lm_sampler(1.0)),
    ):
        tokens = []
        for sampler in (ours, theirs):
            mx.random.seed(3)
            tokens.append([sampler(logprobs).item() for _ in range(20)])
        assert tokens[0] == tokens[1]
