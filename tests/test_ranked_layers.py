"""Dense models whose layers are shared out over ranks, against mlx-lm's resident model, bit for bit."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mixtures import assert_same, make_mixture  # type: ignore[import-not-found]
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from ranks_double import ThreadRank, ranks_as_threads  # type: ignore[import-not-found]
from slow_cases import others  # type: ignore[import-not-found]
from test_streamed_layers import DENSE as STREAMED  # type: ignore[import-not-found]

from mlx_flash.errors import FlashError, ReadError, UnsupportedModelError, UsageError
from mlx_flash.layers import ranked_layers
from mlx_flash.loading import layer_weights
from mlx_flash.loading.in_place_loading import plan_in_place
from mlx_flash.loading.in_place_model import InPlaceModel, open_in_place
from mlx_flash.loading.layer_ranges import RankRoom, divide_layers, find_joints
from mlx_flash.loading.layer_ranks import DividedLayers
from mlx_flash.loading.layers_of_rank import LayersOfRank
from mlx_flash.loading.options import LoadOptions
from mlx_flash.loading.ranked_loading import Ranks
from mlx_flash.loading.runtime import BUFFER_CACHE
from mlx_flash.ranks.group import Handlers

PROMPT = list(range(3, 40))
WIDE = {"num_hidden_layers": 5, "intermediate_size": 128}
DENSE = [family for family in STREAMED if family not in ("mamba2", "recurrent_gemma", "lfm2")]

LOADING = threading.Lock()  # plans trace models, which replaces functions of MLX for the whole process


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models' tensors are short."""
    monkeypatch.setattr(layer_weights, "SHORTEST_TENSOR", 2048)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def make(family: str) -> Path:
        changes = {**WIDE, **STREAMED[family]}
        return make_mixture(tmp_path_factory.mktemp(family), family, "4 bits", **changes)

    return make


@contextlib.contextmanager
def shared_out(
    folder: Path, size: int, streamed: bool = False, options: LoadOptions | None = None, **changes: Any
) -> Iterator[tuple[Any, ThreadRank]]:
    """(model, rank 0's group) of a model on `size` ranks. streamed: whether every rank reads layers for each token."""
    options = options or LoadOptions(context=128, trials=False, **changes)
    parts = []

    def register(group: Any, handlers: Handlers) -> None:
        def plan(asked: dict[str, Any]) -> dict[str, Any]:
            with LOADING:
                parts.append(part := LayersOfRank(group, folder, options, asked))
                handlers.questions["build"] = lambda share: build(part, share)
                return part.offer()

        def build(part: LayersOfRank, share: dict[str, Any]) -> dict[str, Any]:
            with LOADING, BUFFER_CACHE.limited():
                part.build(share)
                handlers.calls[part.kind] = part
                handlers.questions.update(part.questions)
            return {}

        handlers.questions["plan"] = plan
        handlers.questions["unload"] = lambda _: {}

    with ranks_as_threads(size, register) as group, none_pinned(streamed):
        mixture = open_in_place(folder)
        divided = DividedLayers(Ranks(group, str(folder), options), folder, mixture, options)
        with BUFFER_CACHE.limited():
            plan, load, _, _ = plan_in_place(folder, mixture, divided.options)
            assert "one conversation at a time" in divided.planned(plan).describe()

            def alone(say: Any) -> Any:
                with LOADING:
                    return load(say)

            model = divided.build(alone, lambda _: None)
            model.flash.ranks.finish()
        try:
            yield model, group
        finally:
            model.flash.close()
    for part in parts:
        part.close()


@contextlib.contextmanager
def none_pinned(wanted: bool) -> Iterator[None]:
    """Inside this context, every rank reads all its layers for every token."""
    spread = InPlaceModel.layers_to_stream
    with pytest.MonkeyPatch.context() as patched:
        if wanted:
            patched.setattr(InPlaceModel, "layers_to_stream", lambda self, _: spread(self, 0))
        yield


def everything(model: Any) -> list[np.ndarray]:
    """Logits of a prompt, single tokens, a few tokens at once, and what follows when some were taken back."""
    cache = make_prompt_cache(model)
    calls = [PROMPT, [4], [9], [77, 31], [6], [9]]
    results = [np.array(model(mx.array([call]), cache=cache).astype(mx.float32)) for call in calls]
    cache = make_prompt_cache(model)
    results.append(np.array(model(mx.array([PROMPT[:6]]), cache=cache).astype(mx.float32)))
    for part in cache:
        part.trim(2)
    return [*results, np.array(model(mx.array([[8]]), cache=cache).astype(mx.float32))]


@functools.cache
def reference(folder: Path) -> list[np.ndarray]:
    return everything(load_model(folder)[0])


@pytest.mark.parametrize(
    ("family", "size", "streamed"),
    others(
        [(family, size, streamed) for family in DENSE for size in (2, 3, 4) for streamed in (False, True)],
        [("llama", 2, False), ("gemma3_text", 3, True)],
    ),
)
def test_the_bits_of_one_rank(model_of: Callable[[str], Path], family: str, size: int, streamed: bool) -> None:
    """With a plan; every family without one is tested in test_ranked_families.py."""
    folder = model_of(family)
    with shared_out(folder, size, streamed) as (model, _):
        for turn in range(2):
            assert_same(everything(model), reference(folder), turn)
        assert (model.flash.streamer.counters.bytes > 0) is streamed


def test_other_ranks_hold_one_conversation(model_of: Callable[[str], Path]) -> None:
    folder = model_of("llama")
    plain = load_model(folder)[0]
    with shared_out(folder, 3) as (model, group):
        first, second = make_prompt_cache(model), make_prompt_cache(model)

        def said(of: Any, cache: Any, ids: list[int]) -> np.ndarray:
            return np.array(of(mx.array([ids]), cache=cache))

        said(model, first, PROMPT)
        copied = copy.deepcopy(first)
        asked = len(group.calls_made)
        said(model, first, [4, 5, 6])
        resident = make_prompt_cache(plain)
        said(plain, resident, PROMPT)
        # The copy is the beginning of what the others hold, so they go back to it.
        assert np.array_equal(said(model, copied, [8]), said(plain, resident, [8]))
        # The other one goes on where they no longer are.
        with pytest.raises(FlashError, match=r"rank 1: .*40 tokens.*anew"):
            said(model, first, [7])
        assert len(group.calls_made) == asked + 4  # nothing was computed
        assert np.array_equal(said(model, copied, [9]), said(plain, resident, [9]))
        said(model, second, PROMPT[:5])
        with pytest.raises(FlashError, match="39 tokens"):
            said(model, copied, [1])
        assert np.array_equal(said(model, second, [3]), said(plain, fed(plain, PROMPT[:5]), [3]))
        # A cache of another text is found out as well.
        strange = make_prompt_cache(model)
        for part, known in zip(strange, second, strict=True):
            part.state = known.state
            if part.keys.dtype == mx.int32:
                part.keys = part.keys + 1
        with pytest.raises(FlashError, match="6 tokens"):
            said(model, strange, [3])


def fed(model: Any, ids: list[int]) -> list[Any]:
    """A prompt cache that holds a text."""
    cache: list[Any] = make_prompt_cache(model)
    mx.eval(model(mx.array([ids]), cache=cache))
    return cache


def test_a_window_that_has_moved_on_cannot_go_back(model_of: Callable[[str], Path]) -> None:
    folder = model_of("gemma3_text")
    with shared_out(folder, 2) as (model, _):
        cache = fed(model, PROMPT)
        before = copy.deepcopy(cache)
        mx.eval(model(mx.array([[4]]), cache=cache))
        with pytest.raises(FlashError, match="37 tokens"):
            model(mx.array([[5]]), cache=before)
        mx.eval(model(mx.array([[6]]), cache=cache))
        options = LoadOptions(context=128, trials=False, draft="ngram")
        with pytest.raises(UsageError, match="drafts"):
            DividedLayers(None, folder, open_in_place(folder), options, object())  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["before the call", "in its own layers", "while they compute", "behind them"])
def test_an_interrupted_pass_leaves_the_ranks_in_step(
    model_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    folder = model_of("llama")
    with shared_out(folder, 3) as (model, group):
        cache = fed(model, PROMPT)
        calls, this = len(group.calls_made), threading.current_thread()
        with monkeypatch.context() as patched:

            def interrupted(*_: Any, **__: Any) -> Any:
                raise KeyboardInterrupt

            if where == "before the call":
                patched.setattr(ranked_layers, "to_numpy", interrupted)
            elif where == "in its own layers":
                patched.setattr(llama.MLP, "__call__", only_in(this, llama.MLP.__call__, interrupted))
            elif where == "behind them":
                patched.setattr(ranked_layers.FirstRank, "leave", after(ranked_layers.FirstRank.leave, interrupted))
            else:
                patched.setattr(group, "results", interrupted)
            before = copy.deepcopy(cache)
            with pytest.raises(KeyboardInterrupt):
                model(mx.array([[4, 5]]), cache=cache)
        assert len(group.calls_made) - calls == {"while they compute": 1, "behind them": 2}.get(where, 0)
        # The others go back to where the text was.
        plain = load_model(folder)[0]
        expected = plain(mx.array([[6]]), cache=fed(plain, PROMPT))
        assert np.array_equal(model(mx.array([[6]]), cache=before), expected)
        assert_same(everything(model), reference(folder), where)


def test_a_pass_that_fails_on_another_rank_ends_its_conversation(
    model_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(*_: Any) -> Any:
        raise ReadError("injected")

    folder = model_of("llama")
    with shared_out(folder, 3) as (model, _):
        cache = fed(model, PROMPT)
        before = copy.deepcopy(cache)
        with monkeypatch.context() as patched:
            patched.setattr(ranked_layers.OtherRank, "leave", failed)
            with pytest.raises(FlashError, match="rank 1: injected"):
                model(mx.array([[4, 5]]), cache=cache)
        with pytest.raises(FlashError, match=r"rank 1: .*anew"):
            model(mx.array([[4, 5]]), cache=before)
        assert_same(everything(model), reference(folder), "afterwards")


def after(real: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: (real(*arguments), call())


def only_in(thread: threading.Thread, real: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` instead of `real` in one thread; the others compute as ever."""

    def either(*arguments: Any, **named: Any) -> Any:
        return call() if threading.current_thread() is thread else real(*arguments, **named)

    return either


def test_what_several_ranks_cannot_do_is_refused(model_of: Callable[[str], Path]) -> None:
    folder = model_of("llama")
    mixture = open_in_place(folder)
    for given, name in (
        ({"parallel": 2}, "--parallel"), ({"kv_bits": 8}, "--kv-bits"), ({"images": True}, "images"),
        ({"adapter": folder}, "adapter"), ({"draft": "mtp"}, "mtp"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=name):
            DividedLayers(None, folder, mixture, LoadOptions(**given))  # type: ignore[arg-type]
    with shared_out(folder, 2) as (model, _):
        with pytest.raises(UsageError, match="prompt cache"):
            model(mx.array([PROMPT]))
        with pytest.raises(UsageError, match="one text"):
            model(mx.array([PROMPT, PROMPT]), cache=make_prompt_cache(model))
        with pytest.raises(UsageError, match="ids alone"):
            model(mx.array([PROMPT]), cache=make_prompt_cache(model), input_embeddings=mx.zeros((1, 37, 64)))
        with pytest.raises(FlashError, match="another way"):
            model.model(mx.array([PROMPT]), cache=make_prompt_cache(model))
        assert_same(everything(model), reference(folder), "afterwards")


@pytest.mark.parametrize("family", ["mamba2", "mixtral"])
def test_models_that_cannot_be_taken_apart(tmp_path: Path, family: str) -> None:
    folder = make_mixture(tmp_path / "model", family, "plain", **{**WIDE, **STREAMED.get(family, {})})
    with pytest.raises(UnsupportedModelError, match="cannot be shared out over ranks"):
        find_joints(open_in_place(folder))


@pytest.mark.parametrize("leads", ["another layer's keys", "the embeddings", "a weight of another layer", "two arrays"])
def test_layers_that_need_more_than_the_result_before(
    model_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, leads: str
) -> None:
    """Such a model would give a wrong text: the other ranks' numbers are not there."""
    folder = model_of("llama")
    mixture = open_in_place(folder)
    find_joints(mixture)
    block, whole = llama.TransformerBlock.__call__, llama.LlamaModel.__call__
    seen: list[Any] = []

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> Any:
        result = block(self, x, mask, cache)
        seen.append(cache)
        if leads == "another layer's keys":
            return result + seen[0].keys[0, 0, 0, 0]
        if leads == "the embeddings":
            return result + mixture.model.model.embed_tokens(mx.array([[1]]))
        if leads == "a weight of another layer":
            return result + mixture.model.layers[0].input_layernorm.weight
        return result, result

    def alone(self: Any, *arguments: Any, **named: Any) -> mx.array:
        seen.clear()
        return whole(self, *arguments, **named)

    monkeypatch.setattr(llama.TransformerBlock, "__call__", call)
    monkeypatch.setattr(llama.LlamaModel, "__call__", alone)
    with pytest.raises(UnsupportedModelError, match="cannot be shared out"):
        find_joints(mixture)


def test_ranges_follow_memory_and_disks() -> None:
    def sizes_of(layers: list[int], *rooms: RankRoom, kept: int = 0) -> list[int]:
        ranges = divide_layers(layers, kept, rooms)
        assert [number for own in ranges for number in own] == list(range(len(layers)))
        return [len(own) for own in ranges]

    even = [100] * 12
    assert sizes_of(even, RankRoom(9000, 1.0), RankRoom(9000, 1.0)) == [6, 6]
    assert sizes_of(even, RankRoom(6000, 1.0), RankRoom(3000, 1.0)) == [8, 4]
    assert sizes_of(even, *[RankRoom(2000, 1.0)] * 4) == [3, 3, 3, 3]
    # A much faster disk reads most of what does not fit, and one that is a little faster a little more.
    assert sizes_of(even, RankRoom(400, 1.0), RankRoom(400, 4.0)) == [4, 8]
    assert sizes_of(even, RankRoom(400, 1.0), RankRoom(400, 1.1)) == [6, 6]
    assert sizes_of(even, RankRoom(800, 1.0), RankRoom(0, 5.0), RankRoom(200, 1.0)) == [8, 2, 2]
    # KV caches take memory too.
    assert sizes_of(even, RankRoom(400, 1.0), RankRoom(2000, 9.0), kept=100) == [2, 10]
    # Equal machines read equally much.
    assert sizes_of(even, *[RankRoom(550, 1.0)] * 2) == [6, 6]
    assert sizes_of([100] * 3, *[RankRoom(0, 1.0)] * 3) == [1, 1, 1]
    with pytest.raises(UnsupportedModelError, match="fewer ranks"):
        divide_layers([100] * 2, 0, [RankRoom(500, 1.0)] * 3)


TURNS = """
import json, sys
import mlx_flash
from mlx_flash.ranks.hosts import local_hosts
from mlx_flash.ranks.leader import Leader
from mlx_flash.source.children import child_environment
from mlx_flash.text.prompt_cache import ReusedPromptCache

ranks = int(sys.argv[2])
group = Leader(local_hosts(ranks), child_environment()) if ranks > 1 else None
model, tokenizer = mlx_flash.load(sys.argv[1], memory="1GB", context=256, group=group, draft="ngram")
turns, prompt, found = ReusedPromptCache(model), list(range(3, 40)), []
for next_prompt in (prompt, [*prompt, 5, 5, 7], prompt[:24], [9, *prompt], prompt):
    answer = turns.stream_generate(tokenizer, next_prompt, 6, prefill_step_size=16)
    found.append([turns.reused, *(response.token for response in answer)])
print(json.dumps(found))
model.flash.close()
if group is not None:
    group.close()
"""


def test_conversations_over_processes(tmp_path: Path) -> None:
    """What is reused of a conversation, and the text, are those of one process."""
    folder = make_mixture(tmp_path / "model", "llama", "4 bits", **{**WIDE, "hidden_size": 256})
    write_tokenizer(folder)
    found = []
    for ranks in (1, 2):
        command = [sys.executable, "-c", TURNS, str(folder), str(ranks)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[0] == found[1]
    assert [reused > 0 for reused, *_ in found[0]] == [False, True, True, False, False]


def test_checksums_of_every_rank(model_of: Callable[[str], Path]) -> None:
    folder = model_of("qwen2")
    with shared_out(folder, 2, streamed=True, verify=True) as (model, _):
        assert_same(everything(model), reference(folder), "verify")
