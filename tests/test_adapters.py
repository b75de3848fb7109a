"""Adapters in models whose layers and experts are streamed, against mlx-lm's own load with the adapter."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from adapters import ATTENTION, make_adapter  # type: ignore[import-not-found]
from conftest import write_tokenizer  # type: ignore[import-not-found]
from hub_server import serve  # type: ignore[import-not-found]
from huggingface_hub import close_session, constants
from mixtures import assert_same, make_mixture, open_streamed  # type: ignore[import-not-found]
from mlx_lm.models.cache import make_prompt_cache
from serving import serving  # type: ignore[import-not-found]
from tiny import make_checkpoint  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.errors import CheckpointError, FlashError, ReadError, UnsupportedModelError, UsageError
from mlx_flash.loading.adapter import open_adapter
from mlx_flash.loading.conversation_key import conversation_key
from mlx_flash.loading.options import LoadOptions
from mlx_flash.server.library import Library
from mlx_flash.source.adapter_files import find_adapter, wanted

PROMPT = list(range(3, 23))
LAYERS = {"num_hidden_layers": 4}
Change = Callable[[dict[str, Any]], None]


def logits_of(model: Any) -> list[np.ndarray]:
    """Of a prompt and two tokens after it."""
    cache = make_prompt_cache(model)
    return [np.array(model(mx.array([ids]), cache=cache)) for ids in (PROMPT, [30], [31])]


def of_mlx_lm(base: Path, adapter: Path) -> list[np.ndarray]:
    model, _ = mlx_lm.utils.load_model(base)
    model = mlx_lm.utils.load_adapters(model, str(adapter))
    model.eval()
    return logits_of(model)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture with a tokenizer."""
    folder = make_mixture(tmp_path_factory.mktemp("base") / "mixture", "qwen3_moe", **LAYERS)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base)


@pytest.mark.parametrize(
    ("family", "quantisation", "kind"),
    [
        ("llama", "plain", "lora"),
        ("llama", "plain", "dora"),
        ("llama", "3 bits", "lora"),  # mlx-lm takes the wrong width for DoRA over 3 bits
        ("llama", "4 bits", "dora"),
        ("qwen3_moe", "plain", "lora"),
        ("qwen3_moe", "4 bits", "lora"),
        ("qwen3_moe", "4 bits", "dora"),
    ],
)
def test_the_bits_are_those_of_mlx_lm(tmp_path: Path, family: str, quantisation: str, kind: str) -> None:
    base = make_mixture(tmp_path / "base", family, quantisation, **LAYERS)
    keys = None if family == "llama" else (*ATTENTION, "self_attn.o_proj", "mlp.gate")
    folder = make_adapter(tmp_path / "adapter", base, kind, keys)
    expected = of_mlx_lm(base, folder)
    plain, _ = mlx_lm.utils.load_model(base)
    assert not np.array_equal(logits_of(plain)[0], expected[0]), "the adapter changes nothing"
    for slots, pinned in ((12, None), (4, 0), (3, 1)):
        adapter = open_adapter(folder)
        model, streamer = open_streamed(base, slots, pinned=pinned, adapter=adapter)
        try:
            assert_same(logits_of(model), expected, (slots, pinned))
        finally:
            streamer.close()


@pytest.mark.parametrize("layers", [1, 16])
def test_only_the_last_layers_are_adapted(tmp_path: Path, layers: int) -> None:
    base = make_mixture(tmp_path / "base", "llama", **LAYERS)
    folder = make_adapter(tmp_path / "adapter", base, keys=None, layers=layers)
    model, streamer = open_streamed(base, 1, pinned=0, adapter=open_adapter(folder))
    try:
        assert_same(logits_of(model), of_mlx_lm(base, folder), layers)
    finally:
        streamer.close()


def test_a_tied_embedding_can_be_adapted(tmp_path: Path) -> None:
    base = make_mixture(tmp_path / "base", "llama", tie_word_embeddings=True)
    folder = make_adapter(tmp_path / "adapter", base, keys=("model.embed_tokens",))
    model, streamer = open_streamed(base, 1, adapter=open_adapter(folder))
    try:
        assert_same(logits_of(model), of_mlx_lm(base, folder), "tied")
    finally:
        streamer.close()


def test_load_plans_the_adapter_and_speaks_as_mlx_lm(base: Path, adapter: Path) -> None:
    plain, plan = mlx_flash.plan(base, context=64), mlx_flash.plan(base, context=64, adapter=adapter)
    added = sum(array.nbytes for array in open_adapter(adapter).tensors.values())
    assert plan.as_dict()["adapter"] == added > 0 == plain.as_dict()["adapter"]
    assert plan.demand.resident == plain.demand.resident and "  adapter  " in plan.describe()
    assert "  adapter  " not in plain.describe()
    reference, tokenizer = mlx_lm.load(str(base), adapter_path=str(adapter))
    expected = [r.token for r in mlx_lm.stream_generate(reference, tokenizer, PROMPT, max_tokens=12)]
    for memory in (plan.smallest, plan.everything):
        model, tokenizer = mlx_flash.load(base, context=64, adapter=str(adapter), memory=memory, verify=True)
        try:
            assert [r.token for r in mlx_flash.stream_generate(model, tokenizer, PROMPT, max_tokens=12)] == expected
            assert model.flash.adapter == adapter
        finally:
            model.flash.close()


def test_a_conversation_is_kept_for_one_adapter(tmp_path: Path, base: Path, adapter: Path) -> None:
    other = make_adapter(tmp_path / "other", base, keys=("self_attn.q_proj",))
    keys = []
    for chosen in (None, adapter, other):
        model, _ = mlx_flash.load(base, context=64, adapter=chosen)
        keys.append(conversation_key(model))
        model.flash.close()
    assert keys[0]["adapter"] is None and len({json.dumps(key) for key in keys}) == 3


def test_generate_and_plan_take_an_adapter(base: Path, adapter: Path, run_generate: Any) -> None:
    flags = ("--model", str(base), "--context", "64", "--temp", "0", "-m", "8", "--ignore-chat-template", "--json")
    code, plain, _ = run_generate(*flags, "--prompt", "abc")
    adapted, out, err = run_generate(*flags, "--prompt", "abc", "--adapter", str(adapter))
    assert code == adapted == 0 and "  adapter  " in err
    found, without = (json.loads(text.splitlines()[-1]) for text in (out, plain))
    assert found["tokens"] != without["tokens"] and found["plan"]["adapter"] > 0 == without["plan"]["adapter"]


def test_a_server_puts_the_adapter_into_its_own_model(base: Path, adapter: Path) -> None:
    with serving(lambda: mlx_flash.load(base, context=64, adapter=adapter)) as server:
        assert server.get("/stats").json()["model"]["adapter"] == str(adapter)
        assert server.get("/stats").json()["plan"]["adapter"] > 0
        library = Library(server.engine, ("own",), str(base), LoadOptions(adapter=adapter))
        assert library._options_to_plan().adapter is None


def test_an_adapter_comes_from_the_hub(tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as hub:
        hub.add("owner/adapter", adapter, **{"README.md": b"#", "0000100_adapters.safetensors": b"x"})
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        importlib.reload(constants)
        try:
            found = find_adapter("owner/adapter")
        finally:
            monkeypatch.undo()
            importlib.reload(constants)
            close_session()
    assert sorted(path.name for path in found.iterdir()) == ["adapter_config.json", "adapters.safetensors"]
    assert open_adapter(found).nbytes == open_adapter(adapter).nbytes


# -- refusals ------------------------------------------------------------------------------------------------


def refused(base: Path, adapter: Path | str, **options: Any) -> FlashError:
    with pytest.raises(FlashError) as caught:
        mlx_flash.plan(base, context=64, adapter=adapter, **options)
    return caught.value


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.update(fine_tune_type="full"), "holds whole weights"),
        (lambda c: c.update(fine_tune_type="x"), "expected lora or dora"),
        (lambda c: c.update(peft_type="LORA"), "it is one of PEFT"),
        (lambda c: c.pop("num_layers"), "num_layers is None"),
        (lambda c: c.pop("lora_parameters"), "expected an object"),
        (lambda c: c["lora_parameters"].pop("scale"), "the scale is None"),
        (lambda c: c["lora_parameters"].update(scale=float("nan")), "the scale is nan"),
        (lambda c: c["lora_parameters"].update(scale="3"), "the scale is '3'"),
        (lambda c: c["lora_parameters"].update(rank=10**9), "the rank is 1000000000"),
        (lambda c: c["lora_parameters"].update(rank=True), "the rank is True"),
        (lambda c: c["lora_parameters"].update(rank=8), "expected numbers with a fraction of shape"),
        (lambda c: c["lora_parameters"].update(dropout=1), "the dropout is 1"),
        (lambda c: c["lora_parameters"].update(keys="q_proj"), "the keys are 'q_proj'"),
        (lambda c: c["lora_parameters"].update(keys=["nothing"]), "no module that this model has"),
        (lambda c: c["lora_parameters"].update(keys=["self_attn.q_proj"]), "has no place for"),
        (lambda c: c["lora_parameters"]["keys"].append("self_attn.k_proj"), "lacks 8 tensors"),
        (lambda c: c["lora_parameters"]["keys"].append("self_attn.q_norm"), "mlx-lm cannot put this adapter"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(base: Path, adapter: Path, change: Change, told: str) -> None:
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    error = refused(base, adapter)
    assert isinstance(error, CheckpointError) and told in str(error) and str(adapter) in str(error)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000, b" " * (2 << 20)])
def test_a_hostile_configuration_is_refused(base: Path, adapter: Path, content: bytes) -> None:
    (adapter / "adapter_config.json").write_bytes(content)
    assert isinstance(refused(base, adapter), CheckpointError)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02}q\x00.",
        (1 << 60).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}x",
        (8).to_bytes(8, "little") + b"\xff" * 8,
    ],
)
def test_a_hostile_file_of_tensors_is_refused(base: Path, adapter: Path, content: bytes) -> None:
    (adapter / "adapters.safetensors").write_bytes(content)
    error = refused(base, adapter)
    assert isinstance(error, CheckpointError) and "adapters.safetensors" in str(error)


def test_whole_numbers_are_not_an_adapter(base: Path, adapter: Path) -> None:
    path = adapter / "adapters.safetensors"
    loaded: Any = mx.load(str(path))
    mx.save_safetensors(str(path), {name: array.astype(mx.int32) for name, array in loaded.items()})
    assert "expected numbers with a fraction" in str(refused(base, adapter))


def test_files_that_are_not_there_or_lead_elsewhere_are_refused(tmp_path: Path, base: Path, adapter: Path) -> None:
    weights, outside = adapter / "adapters.safetensors", tmp_path / "outside.safetensors"
    weights.rename(outside)
    assert "has no adapters.safetensors" in str(refused(base, adapter))
    weights.symlink_to(outside)
    assert "is a link to" in str(refused(base, adapter))
    weights.unlink()
    os.mkfifo(weights)
    assert "is a named pipe" in str(refused(base, adapter))
    assert "neither a folder" in str(refused(base, tmp_path / "nowhere"))
    assert isinstance(refused(base, ""), UsageError)
    with pytest.raises(CheckpointError, match="adapter of PEFT"):
        wanted(["adapter_config.json", "adapter_model.safetensors"], lambda _: "", "owner/name")


def test_experts_cannot_be_adapted(tmp_path: Path, base: Path) -> None:
    error = refused(base, make_adapter(tmp_path / "experts", base, keys=None))
    assert isinstance(error, UnsupportedModelError) and "switch_mlp" in str(error) and "mlx_lm.fuse" in str(error)


def test_rows_of_a_table_cannot_be_adapted(tmp_path: Path) -> None:
    base = make_mixture(tmp_path / "base", "llama", vocab_size=60_000)
    write_tokenizer(base)
    error = refused(base, make_adapter(tmp_path / "adapter", base, keys=("model.embed_tokens",)))
    assert isinstance(error, UnsupportedModelError) and "rows of a table" in str(error)


def test_a_store_takes_no_adapter(tmp_path: Path, adapter: Path) -> None:
    base = make_checkpoint(tmp_path / "opt")
    write_tokenizer(base)
    error = refused(base, adapter)
    assert isinstance(error, UsageError) and "neuron by neuron" in str(error)


def test_an_adapter_is_for_text(base: Path, adapter: Path) -> None:
    assert isinstance(refused(base, adapter, images=True), UsageError)
    assert isinstance(refused(base, adapter, draft="mtp"), FlashError)
    with pytest.raises(UsageError, match="adapter is 1"):
        mlx_flash.plan(base, adapter=1)


def test_a_file_that_is_cut_after_the_plan_ends_with_an_error(base: Path, adapter: Path) -> None:
    path = adapter / "adapters.safetensors"
    chosen = open_adapter(adapter)
    os.truncate(path, path.stat().st_size - 64)
    with pytest.raises(ReadError, match=r"adapters\.safetensors"):
        chosen.read()
