"""What a model can be loaded with besides, over two ranks: the text of one rank, or its bits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from adapters import make_adapter  # type: ignore[import-not-found]
from conftest import Tiny  # type: ignore[import-not-found]
from mixtures import assert_same, make_mixture  # type: ignore[import-not-found]
from mlx_lm.models.cache import make_prompt_cache
from scripted import VOCABULARY  # type: ignore[import-not-found]
from serving import Server, serving  # type: ignore[import-not-found]
from templates import TEMPLATES, write_tokenizer  # type: ignore[import-not-found]
from test_ranked_loading import group_of  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.loading.conversation_key import conversation_key
from mlx_flash.loading.ranked_loading import Ranks
from mlx_flash.ranks.group import Group
from mlx_flash.source.conversation_folder import ConversationFolder
from mlx_flash.text.conversation_files import ConversationFiles
from mlx_flash.text.prompt_cache import ReusedPromptCache

pytestmark = pytest.mark.usefixtures("one_processor")

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
LONG = list(range(3, 40))
TURNS = (LONG, [*LONG, 9, 8], LONG[:24], [50, *LONG], [*LONG, 9, 8, 7])


@pytest.fixture(autouse=True)
def one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading replaces functions of MLX for the whole process, so here the other ranks load first."""
    monkeypatch.setattr(Ranks, "begin", lambda self, share: self.group.ask({"build": share}))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("mixture"), "qwen3_moe", head_dim=32)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("dense"), "llama", num_hidden_layers=3)


def made(folder: Path, family: str, **changes: Any) -> Path:
    """A checkpoint with a tokenizer and a chat template."""
    make_mixture(folder, family, **{"vocab_size": VOCABULARY, **changes})
    write_tokenizer(folder, TEMPLATES["agent"])
    return folder


@pytest.fixture
def group() -> Iterator[Group]:
    with group_of([None], [None]) as made:
        yield made


def load(folder: Path, group: Group | None, **options: Any) -> tuple[Any, Any]:
    given = {"memory": "1GB", "context": 256, "prefill_chunk": 16, "trials": False, **options}
    return mlx_flash.load(folder, group=group, **given)


def on_both(folder: Path, group: Group, act: Callable[[Any, Any], Any], **options: Any) -> list[Any]:
    """What `act` returns for the model and the tokenizer, on one rank and on two."""
    found = []
    for ranks in (None, group):
        model, tokenizer = load(folder, ranks, **options)
        try:
            found.append(act(model, tokenizer))
        finally:
            model.flash.close()
    return found


def said(model: Any, tokenizer: Any) -> list[int]:
    return [each.token for each in mlx_flash.stream_generate(model, tokenizer, PROMPT * 5, max_tokens=16)]


def logits(model: Any, _: Any = None) -> list[np.ndarray]:
    cache = make_prompt_cache(model)
    return [np.array(model(mx.array([ids]), cache=cache).astype(mx.float32)) for ids in (PROMPT, [9], [8, 7])]


OPTIONS: list[dict[str, Any]] = [
    {"draft": "ngram", "io": "buffered", "threads": 3, "verify": True},
    {"draft_model": True},
]


@pytest.mark.parametrize("options", [*OPTIONS, {"kv_bits": 8}, {"parallel": 2, "prompt_cache": "8MB"}])
def test_a_mixture(mixture: Path, dense: Path, group: Group, options: dict[str, Any]) -> None:
    given = {**options, "draft_model": dense} if "draft_model" in options else options
    alone, together = on_both(mixture, group, said, **given)
    assert alone == together and len(alone) > 4


@pytest.mark.parametrize("options", OPTIONS)
def test_a_dense_model(dense: Path, group: Group, options: dict[str, Any]) -> None:
    given = {**options, "draft_model": dense} if "draft_model" in options else options
    alone, together = on_both(dense, group, said, **given)
    assert alone == together and len(alone) > 4


@pytest.mark.parametrize("options", [{"draft": "ngram", "io": "buffered", "threads": 3}])
def test_a_store(tiny: Tiny, group: Group, options: dict[str, Any]) -> None:
    alone, together = on_both(tiny.store, group, said, **options)
    assert alone == together and len(alone) > 4


def test_an_adapter_of_a_mixture(mixture: Path, group: Group, tmp_path: Path) -> None:
    """It is in rank 0's part, which is all but the experts."""
    adapter = make_adapter(tmp_path / "adapter", mixture)
    alone, together = on_both(mixture, group, logits, adapter=adapter)
    assert_same(together, alone, "adapter")
    plain, _ = load(mixture, None)
    assert not np.array_equal(logits(plain)[0], alone[0])
    plain.flash.close()


@pytest.mark.parametrize(("family", "more"), [("qwen3_moe", 4_000_000), ("llama", 1_000_000)])
def test_rows_of_a_table(group: Group, tmp_path: Path, family: str, more: int) -> None:
    """Rank 0 alone has the embeddings, and reads rows of them where its memory is small."""
    folder = made(tmp_path / "model", family, vocab_size=40_000)
    expected, _ = load(folder, None, context=64)
    smallest = mlx_flash.plan(folder, memory=2**60, context=64, prefill_chunk=16).smallest
    model, _ = load(folder, group, context=64, memory=smallest + more)
    try:
        assert model.flash.plan.reads_rows and not expected.flash.plan.reads_rows
        assert_same(logits(model), logits(expected), family)
    finally:
        model.flash.close()
        expected.flash.close()


def talk(model: Any, tokenizer: Any, files: ConversationFiles | None = None) -> list[list[int]]:
    """How many tokens of each turn were in a cache, and its answer."""
    turns, found = ReusedPromptCache(model, files), []
    for prompt in TURNS:
        answer = turns.stream_generate(tokenizer, prompt, 5)
        found.append([*(each.token for each in answer), turns.reused])
    turns.close()
    return found


def test_prompt_caches_of_a_mixture(mixture: Path, group: Group) -> None:
    alone, together = on_both(mixture, group, talk, prompt_cache="16MB")
    assert alone == together and [reused for *_, reused in together][1:] != [0] * 4


def test_a_kept_conversation_goes_on_over_ranks(mixture: Path, group: Group, tmp_path: Path) -> None:
    """One that a single process kept is read back over two ranks: its key is that of the model."""

    def kept(model: Any, tokenizer: Any) -> list[list[int]]:
        folder = ConversationFolder(tmp_path / "kept", "model-0123456789ab", conversation_key(model), 1 << 30)
        return talk(model, tokenizer, ConversationFiles(folder, model, lambda _: None))

    alone, together = on_both(mixture, group, kept, prompt_cache="16MB")
    assert [turn[:-1] for turn in alone] == [turn[:-1] for turn in together]
    assert together[0][-1] > 0 == alone[0][-1]


# -- the server ------------------------------------------------------------------------------------------------------

SAY = {"max_tokens": 8, "temperature": 0}
JSON = {"type": "json_object"}
OLLAMA = {"num_predict": 8, "temperature": 0}
MESSAGES = [{"role": "user", "content": "abcabc"}]
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "abcabc", **SAY}),
    ("/v1/chat/completions", {"messages": MESSAGES, **SAY}),
    ("/v1/messages", {"messages": MESSAGES, "model": "m", **SAY}),
    ("/v1/responses", {"input": "abcabc", "max_output_tokens": 16, "temperature": 0}),
    (
        "/api/chat",
        {"messages": MESSAGES, "model": "demo", "stream": False, "options": {"num_predict": 8, "temperature": 0}},
    ),
]
WRITTEN = ("choices", "content", "output", "message")


def answers(server: Server, pool: ThreadPoolExecutor) -> list[Any]:
    """What every API says, asked at once."""
    replies = list(pool.map(lambda asked: server.post(*asked), ASKED))
    assert all(reply.status_code == 200 for reply in replies), [reply.text for reply in replies]
    return [texts_in({key: reply.json().get(key) for key in WRITTEN}) for reply in replies]


def texts_in(part: Any) -> list[str]:
    """The texts of an answer, without its ids and times."""
    if isinstance(part, dict):
        named = {key: value for key, value in part.items() if key in (*WRITTEN, "text", "thinking", "arguments")}
        return [text for value in named.values() for text in texts_in(value)]
    return [text for each in part for text in texts_in(each)] if isinstance(part, list) else [str(part)]


@pytest.mark.parametrize(("kind", "parallel"), [("mixture", 2), ("dense", 1)])
def test_all_apis_of_a_server(kind: str, parallel: int, group: Group, request: pytest.FixtureRequest) -> None:
    folder, found = request.getfixturevalue(kind), []
    for ranks in (None, group):
        given = functools.partial(load, folder, ranks, parallel=parallel, prompt_cache="16MB")
        with serving(given) as server, ThreadPoolExecutor(len(ASKED)) as pool:
            found.append(answers(server, pool))
            if kind == "dense" and ranks is not None:
                refused = server.post("/v1/chat/completions", {"messages": MESSAGES, "response_format": JSON, **SAY})
                assert refused.status_code == 400 and "over several ranks" in refused.text
            model = server.engine.model
        model.flash.close()
    assert found[0] == found[1] and all("".join(texts) for texts in found[0])
