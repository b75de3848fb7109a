"""The streamed model beside the dense one, on a tiny model: perplexity, agreement, divergence, tasks."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import PREDICTORS, Tiny, write_tokenizer  # type: ignore[import-not-found]
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_flash.bench import quality
from mlx_flash.bench.tools import score, tasks
from mlx_flash.convert.conversion import Settings, convert
from mlx_flash.errors import FlashError, UsageError
from mlx_flash.loading.model_types import model_classes
from mlx_flash.source.resolve import demo_folder

pytestmark = pytest.mark.usefixtures("one_processor")

PREFIX = [0]
IDS = [int(i) for i in np.random.default_rng(0).integers(1, 90, 36)]
CONTEXT = 32  # 36 tokens: a window of 31, and one of 5, which would take the decode path by default
REPOSITORY = Path(__file__).parent.parent


def compare(model: Any) -> score.Comparison:
    return score.compare(model, lambda: make_prompt_cache(model), IDS, PREFIX)


def nats_of(model: Any) -> float:
    """Negative log-likelihood by the plain model, computed by hand."""
    nats = 0.0
    for window in (IDS[:31], IDS[31:]):
        line = mx.array(PREFIX + window)
        logits = model(line[None, :-1])[0]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        nats -= float(mx.take_along_axis(logprobs, line[1:, None], axis=-1).sum().item())  # type: ignore[arg-type]
    return nats


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_the_dense_side_is_the_plain_model(tiny: Tiny, open_model: Callable[..., Any], predictor: str) -> None:
    model = open_model(tiny.store, slots=20, predictor=predictor, context=CONTEXT)
    found = compare(model)
    assert found.dense.tokens == len(found.divergences) == 36
    assert found.dense_nats == pytest.approx(nats_of(tiny.dense), rel=1e-5)
    assert min(found.divergences) >= 0
    decoded = score.score(model, lambda: make_prompt_cache(model), IDS, PREFIX, CONTEXT, 8)
    assert found.nats == pytest.approx(decoded.nats, rel=1e-5)
    assert found.rise == pytest.approx(found.streamed.perplexity / found.dense.perplexity - 1, abs=1e-9)
    if predictor in ("none", "exact"):
        assert found.streamed.perplexity == pytest.approx(found.dense.perplexity, rel=1e-5)
        assert found.agreed == 36
        assert max(found.divergences) < 1e-9
        assert abs(found.rise) < 1e-5
    else:
        assert max(found.divergences) > 1e-9


def test_a_gated_model_of_mlx_lms_form(tmp_path: Path, open_model: Callable[..., Any]) -> None:
    config = {"model_type": "llama", "hidden_act": "relu", "hidden_size": 64, "intermediate_size": 256}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    config |= {"rms_norm_eps": 1e-6, "max_position_embeddings": 64, "rope_theta": 10000.0}
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(config))
    model_class, args_class = model_classes(config)
    mx.random.seed(0)
    plain = model_class(args_class.from_dict(config))
    mx.save_safetensors(str(checkpoint / "model.safetensors"), dict(tree_flatten(plain.parameters())))
    write_tokenizer(checkpoint)
    convert(checkpoint, tmp_path / "store", Settings(calibration_tokens=256))
    found = compare(open_model(tmp_path / "store", slots=20, predictor="exact", context=CONTEXT))
    assert found.dense_nats == pytest.approx(nats_of(plain), rel=1e-5)
    assert found.agreed == 36 and 0 <= max(found.divergences) < 1e-9


def test_a_predictor_that_chooses_nothing_is_found_out(tiny: Tiny, open_model: Callable[..., Any]) -> None:
    model = open_model(tiny.store, predictor="lowrank", context=CONTEXT)
    before = compare(model)
    for layer in model.layers:
        layer.mlp.predictor.c = layer.mlp.predictor.c - 1e6
    found = compare(model)
    assert found.dense_nats == pytest.approx(before.dense_nats, rel=1e-6)
    assert sum(found.divergences) > 10 * sum(before.divergences)
    assert found.agreed < before.agreed


def test_divergence_of_distributions_known_by_hand() -> None:
    found = score.Comparison()
    p, q = np.array([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]), np.array([[0.1, 0.8, 0.1], [0.2, 0.3, 0.5]])
    found.add(np.log(p).astype(np.float32) + 7, np.log(q).astype(np.float32) - 3, np.array([0, 2]))
    expected = 0.5 * math.log(5) + 0.25 * math.log(0.25 / 0.8) + 0.25 * math.log(2.5)
    assert found.divergences == pytest.approx([expected, 0], abs=1e-6)
    assert found.agreed == 1
    assert found.dense.perplexity == pytest.approx(2) and found.streamed.perplexity == pytest.approx(math.sqrt(20))
    assert found.rise == pytest.approx(math.sqrt(5) - 1)
    # The losses are log 5 and 0. The standard error of their mean is half of log 5 over the square root of two.
    assert found.rise_error == pytest.approx(math.sqrt(5) * math.log(5) / 2 / math.sqrt(2))


def test_logits_far_apart_do_not_overflow() -> None:
    found = score.Comparison()
    found.add(np.array([[0, 1e4]], np.float32), np.array([[1e4, 0]], np.float32), np.array([0]))
    assert found.divergences == [1e4] and found.losses == [-1e4]


def test_each_chunk_reads_the_layers_once(
    tiny: Tiny, open_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(tiny.store, slots=0, predictor="none", context=CONTEXT)
    given = np.array(PREFIX + IDS[:30], np.int32)
    (whole,) = score.dense_hidden(model, given, make_prompt_cache(model))
    monkeypatch.setattr(score, "PREFILL_TOKENS", 10)
    layout, before = model.flash.manifest.layout, model.flash.streamer.counters.bytes
    chunks = score.dense_hidden(model, given, make_prompt_cache(model))
    assert [len(chunk) for chunk in chunks] == [10, 10, 10, 1]
    assert model.flash.streamer.counters.bytes - before == 4 * layout.layers * layout.blocks * layout.block_bytes
    assert np.allclose(mx.concatenate(chunks), whole, atol=1e-5)


def test_the_model_is_itself_again_after_an_error(tiny: Tiny, open_model: Callable[..., Any]) -> None:
    model = open_model(tiny.store, context=CONTEXT)
    expected = np.array(model(mx.array([IDS[:5]])))
    with pytest.raises(ValueError, match="position"):
        score.dense_hidden(model, np.zeros(100, np.int32), make_prompt_cache(model))
    assert np.array_equal(np.array(model(mx.array([IDS[:5]]))), expected)


# -- the command ---------------------------------------------------------------------------------------------


def run(*flags: object) -> None:
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    quality.main(parser.parse_args([str(flag) for flag in flags]))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("so it goes on and on, and on. " * 3)
    return path


@pytest.mark.parametrize("predictor", ["none", "shadow"])
def test_the_last_line_has_both_perplexities(
    tiny: Tiny, text: Path, capsys: pytest.CaptureFixture[str], predictor: str
) -> None:
    run("--model", tiny.store, "--text", text, "--tokens", 40, "--context", 32, "--predictor", predictor)
    output = capsys.readouterr().out
    result = json.loads(output.splitlines()[-1])
    assert result["command"] == "quality" and result["predictor"] == predictor
    assert (result["tokens"], result["context"]) == (40, 32)
    assert result["perplexity"] > 1 and result["dense_perplexity"] > 1
    assert quality.readable(result["dense_perplexity"]) in output.splitlines()[1]
    assert result["kl_nats"]["max"] >= result["kl_nats"]["p99"] >= result["kl_nats"]["median"] >= 0
    if predictor == "none":
        assert result["perplexity"] == pytest.approx(result["dense_perplexity"], rel=1e-5)
        assert result["kl_nats"]["max"] < 1e-9 and result["top1_agreement"] == 1
    assert result["peak_memory_bytes"] > 0


@pytest.mark.parametrize(
    "wrong", [["--tokens", "3"], ["--context", "0"], ["--predictor", "oracle"], ["--limit", "none"], ["--text"]]
)
def test_flags_that_mean_nothing(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        run(*wrong)
    assert raised.value.code == 2 and wrong[0] in capsys.readouterr().err


def test_there_must_be_something_to_measure(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--text FILE") as raised:
        run("--model", tiny.store)
    assert raised.value.exit_code == 2
    short = tmp_path / "short.txt"
    short.write_text("so it goes")
    with pytest.raises(UsageError, match="has 10 tokens, expected at least 16"):
        run("--model", tiny.store, "--text", short)
    with pytest.raises(UsageError, match="cannot read --text"):
        run("--model", tiny.store, "--text", tmp_path / "absent.txt")


# -- tasks ---------------------------------------------------------------------------------------------------


def test_tasks_without_lm_eval_are_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    with pytest.raises(UsageError, match=r"pip install .*\[eval\]") as raised:
        run("--model", "/nowhere", "--tasks", "arc_easy")
    assert raised.value.exit_code == 2 and "\n" not in str(raised.value)


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """lm-eval with the test's own cache of data sets, in which the task file's path to its data is valid."""
    module = pytest.importorskip("lm_eval")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(REPOSITORY)
    return module


def likelihood_of(model: Any, ids: list[int], begin: int) -> float:
    """Sum of the log-probabilities of ids[begin:] by the plain model."""
    logits = model(mx.array([ids[:-1]]))[0]
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    return float(sum(logprobs[at - 1, ids[at]] for at in range(begin, len(ids))))


@pytest.mark.parametrize("predictor", ["exact", "lowrank"])
def test_the_hook_scores_answers_as_the_plain_model_does(
    lm_eval: Any, tiny: Tiny, tokenizer: Any, open_model: Callable[..., Any], predictor: str
) -> None:
    from lm_eval.api.instance import Instance

    model = open_model(tiny.store, slots=20, predictor=predictor, context=48)
    pairs = [("so it goes", " on and on"), ("so it goes", " x"), ("every word of it is true", "!"), ("", "abc")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    expected = []
    for context, answer in pairs:
        ids, begin = tokenizer.encode(context + answer), len(tokenizer.encode(context))
        expected.append(likelihood_of(tiny.dense, ids, begin))
    with score.all_neurons(model):
        dense = tasks.language_model(model, tokenizer, 128).loglikelihood(requests)
    assert [likelihood for likelihood, _ in dense] == pytest.approx(expected, rel=1e-4)
    streamed = tasks.language_model(model, tokenizer, 8).loglikelihood(requests)
    closely = [likelihood for likelihood, _ in streamed] == pytest.approx(expected, rel=1e-5)
    assert closely == (predictor == "exact")


def test_a_question_longer_than_the_context_loses_its_beginning(
    lm_eval: Any, tiny: Tiny, tokenizer: Any, open_model: Callable[..., Any]
) -> None:
    from lm_eval.api.instance import Instance

    model = open_model(tiny.store, predictor="exact", context=24)
    context, answer = "on and on and on and on it goes", " and so on"
    ((likelihood, _),) = tasks.language_model(model, tokenizer, 8).loglikelihood(
        [Instance("loglikelihood", {}, (context, answer), 0)]
    )
    ids = tokenizer.encode(context + answer)
    kept = ids[-25:]  # the last token is scored and never fed
    begin = len(kept) - (len(ids) - len(tokenizer.encode(context)))
    assert likelihood == pytest.approx(likelihood_of(tiny.dense, kept, begin), rel=1e-4)


def test_the_demo_model_answers_alike_streamed_and_dense(
    lm_eval: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(demo_folder(), tmp_path / "store", Settings(calibration_tokens=256))
    run("--model", tmp_path / "store", "--tasks", "tests/tasks/endings.yaml", "--limit", 24)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["perplexity"] is result["dense_perplexity"] is None
    rows = {row["metric"]: row for row in result["tasks"]}
    assert set(rows) == {"acc", "acc_norm"}
    for row in rows.values():
        assert (row["task"], row["questions"]) == ("endings", 24)
        assert row["dense"] > 0.5 > 0.25 + 2 * row["dense_stderr"]  # chance is a quarter
        assert row["same_answer"] > 0.9
        assert abs(row["dense"] - row["streamed"]) <= 1 - row["same_answer"] + 1e-9
    run("--model", tmp_path / "store", "--tasks", "tests/tasks", "--limit", 4, "--predictor", "exact")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["questions"], row["same_answer"]) for row in result["tasks"]] == [(4, 1.0)] * 2


def test_tasks_that_cannot_be_run(lm_eval: Any, tiny: Tiny, tmp_path: Path) -> None:
    sound = Path("tests/tasks/endings.yaml").read_text()
    (tmp_path / "empty").mkdir()
    (tmp_path / "generating.yaml").write_text(
        sound.replace("multiple_choice", "generate_until").replace("acc_norm", "exact_match").replace("acc", "bleu")
    )
    (tmp_path / "lost.yaml").write_text(sound.replace("endings.jsonl", "absent.jsonl"))
    for names, message in [
        ("endings", "neither a task of lm-eval"),
        ("", "separated by commas"),
        (f"{tmp_path / 'empty'}", "holds no task file"),
        (f"{tmp_path / 'generating.yaml'}", "of the kind generate_until"),
    ]:
        with pytest.raises(UsageError, match=message):
            tasks.find(names)
    with pytest.raises(FlashError, match=r"absent\.jsonl") as raised:
        tasks.find(str(tmp_path / "lost.yaml"))
    assert raised.value.exit_code == 1


def test_a_folder_stands_for_its_tasks(lm_eval: Any) -> None:
    (task,) = tasks.find("tests/tasks")
    assert task.task_name == "endings" and len(task.eval_docs) == 40
