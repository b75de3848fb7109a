"""Models whose lookup tables are read row by row, against mlx-lm's resident model, bit for bit."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from interrupts import InterruptAt  # type: ignore[import-not-found]  # found beside this file
from mixtures import assert_same, make_mixture  # type: ignore[import-not-found]
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from slow_cases import others, slow  # type: ignore[import-not-found]
from table_models import MODELS, VOCABULARY, make_model  # type: ignore[import-not-found]

from mlx_flash.errors import BudgetError, ReadError
from mlx_flash.flash.in_place import InPlaceFiles
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.safetensors_file import read_header
from mlx_flash.flash.table_rows import RowCache, TableRows
from mlx_flash.layers.streamed_table import StreamedTable
from mlx_flash.loading import in_place_loading, lookup_tables
from mlx_flash.loading.in_place_loading import plan_in_place
from mlx_flash.loading.in_place_model import open_in_place
from mlx_flash.loading.lazy_model import LazyModel, open_lazily
from mlx_flash.loading.lookup_tables import KEPT_SHARE, stream_tables
from mlx_flash.loading.options import LoadOptions
from mlx_flash.loading.plan import ENDLESS
from mlx_flash.loading.provenance import Provenance
from mlx_flash.loading.resident_weights import open_files

pytestmark = pytest.mark.usefixtures("one_processor")

PROMPT = [5, 17, 80, 3, 44, 61, 9, 9, 30, 72, 1, 55, 8, 90, 31, 2, 77, 64, 12, 40, 33, 21, 7, 68, 50]
TABLES = {
    "llama": ["model.embed_tokens"],
    "gemma3n": ["model.language_model.embed_tokens_per_layer"],
    "gemma4": ["language_model.model.embed_tokens_per_layer"],
    "longcat_flash_ngram": [
        "model.ngram_embeddings.word_embeddings",
        "model.ngram_embeddings.embedders.0",
        "model.ngram_embeddings.embedders.1",
    ],
}
NOTHING_KEPT = RowCache({"weight": 1}, 0)
EVERYTHING = 1 << 30  # bytes; more than any of these tables has


@pytest.fixture(autouse=True)
def smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models' tables are small."""
    monkeypatch.setattr(lookup_tables, "LEAST_BYTES", 0)
    monkeypatch.setattr(lookup_tables, "WORTH", 0)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @functools.cache
    def make(name: str, quantisation: str = "plain", shards: int = 1) -> Path:
        return make_model(tmp_path_factory.mktemp(name), name, quantisation, shards)

    return make


@pytest.fixture
def stream() -> Iterator[Callable[..., tuple[Any, InPlaceFiles]]]:
    """(model, streamer) of a checkpoint whose tables keep so many bytes of rows."""
    streamers: list[InPlaceFiles] = []

    def open_one(folder: Path, kept: int) -> tuple[Any, InPlaceFiles]:
        mixture = open_in_place(folder)
        streamers.append(InPlaceFiles(open_files(mixture.files, direct=True), Reader(4)))
        stream_tables(mixture.lookup_tables, streamers[-1], kept, compared=False)
        return mixture.model, streamers[-1]

    yield open_one
    for streamer in streamers:
        streamer.close()


def everything(model: Any) -> list[np.ndarray]:
    """Logits of a prompt, single tokens, a few tokens at once, and a batch without a cache."""
    cache = make_prompt_cache(model)
    calls = [PROMPT, [4], [9], [77, 31], [6], [12, 4, 50], [9]]
    results = [np.array(model(mx.array([call]), cache=cache)) for call in calls]
    batch = np.array(model(mx.array([PROMPT[:9], PROMPT[9:18]]), cache=make_prompt_cache(model)))
    return [*results, batch]


@functools.cache
def reference(folder: Path) -> list[np.ndarray]:
    return everything(load_model(folder)[0])


def streamed(model: Any) -> dict[str, StreamedTable]:
    return {path: module for path, module in model.named_modules() if isinstance(module, StreamedTable)}


# -- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "quantisation"),
    others(
        [(name, quantisation) for name in MODELS for quantisation in ("plain", "4 bits", "mxfp4")],
        [*((name, "4 bits") for name in MODELS), ("llama", "plain"), ("llama", "mxfp4")],
    ),
)
def test_every_model_has_the_bits_of_mlx_lm(
    model_of: Callable[..., Path], stream: Callable[..., Any], name: str, quantisation: str
) -> None:
    folder = model_of(name, quantisation)
    expected = reference(folder)
    for kept in (0, 900, EVERYTHING):
        model, streamer = stream(folder, kept)
        assert sorted(streamed(model)) == sorted(TABLES[name])
        assert_same(everything(model), expected, kept)
        assert (read := streamer.counters.bytes) > 0
        assert_same(everything(model), expected, (kept, "again"))
        assert (streamer.counters.bytes == read) == (kept == EVERYTHING), "every row that is asked for is kept by now"


def test_the_parts_of_a_row_lie_in_several_files(model_of: Callable[..., Path], stream: Callable[..., Any]) -> None:
    folder = model_of("llama", "4 bits", shards=4)
    model, _ = stream(folder, 500)
    assert len({tensor.file for tensor in streamed(model)["model.embed_tokens"].rows.tensors.values()}) > 1
    assert_same(everything(model), reference(folder), "shards")


def test_a_mixture_reads_experts_and_rows(tmp_path: Path) -> None:
    folder = make_mixture(tmp_path, "qwen3_moe", "4 bits")
    mixture = open_in_place(folder)
    shared = InPlaceFiles(open_files(mixture.files, direct=True), Reader(4))
    try:
        mixture.stream_experts(shared, [2] * len(mixture.switches), None)
        stream_tables(mixture.lookup_tables, shared, 400, compared=False)
        assert_same(everything(mixture.model), reference(folder), "experts and rows")
    finally:
        shared.close()


# -- which modules are tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "seed_oss"])
def test_an_embedding_that_is_the_output_head_is_not_a_table(tmp_path: Path, family: str) -> None:
    more = {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    more |= {"attention_out_bias": False}
    folder = make_mixture(tmp_path, "mixtral", model_type=family, tie_word_embeddings=True, **more)
    assert not open_in_place(folder).lookup_tables


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_is_copied_to_the_output_head_is_not_a_table(tmp_path: Path, tied: bool) -> None:
    """This family's code gives the head the embedding's tensor if the checkpoint has none."""
    folder = make_mixture(tmp_path, "mixtral", model_type="minicpm", dim_model_base=64, scale_depth=1.4, scale_emb=1)
    if tied:
        weights: Any = mx.load(str(folder / "model.safetensors"))
        mx.eval(weights)
        mx.save_safetensors(str(folder / "model.safetensors"), {n: w for n, w in weights.items() if "lm_head" not in n})
    assert len(open_in_place(folder).lookup_tables) == (not tied)


class Shifted(nn.Embedding):
    """Not a table of rows: row i of the result is row i + 2 of the weight."""

    def __call__(self, ids: mx.array) -> mx.array:
        return super().__call__(ids + 2)


class Toy(nn.Module):
    """Uses `table` in a way that `used` names, and other embeddings in other ways."""

    def __init__(self, used: str) -> None:
        super().__init__()
        self.used = used
        self.table = nn.Embedding(32, 16)
        self.again = self.table
        self.pieces = [nn.Embedding(8, 16) for _ in range(3)]
        self.unused = nn.Embedding(8, 16)
        self.shifted = Shifted(40, 16)
        self.layers = [nn.Linear(16, 16, bias=False)]

    def __call__(self, ids: mx.array, cache: Any = None) -> mx.array:
        x = self.table(ids) + self.again(ids) + self.pieces[1](ids % 8) + self.shifted(ids)
        if self.used == "head":
            return self.table.as_linear(x)
        if self.used == "attribute":
            x = x + self.again.weight[0]
        if self.used == "item":
            x = x + self.table["weight"][0]
        if self.used == "test":
            x = x if "scales" in self.table else 2 * x
        if self.used == "fails":
            raise NotImplementedError
        return self.layers[0](x)

    def make_cache(self) -> list[Any]:
        return []


@pytest.mark.parametrize("used", ["rows", "head", "attribute", "item", "test", "fails"])
def test_tables_are_found_by_how_a_model_uses_them(tmp_path: Path, used: str) -> None:
    toy, file = Toy(used), tmp_path / "toy.safetensors"
    parameters: Any = dict(tree_flatten(toy.parameters()))
    mx.save_safetensors(str(file), parameters)
    modules = {path: id(module) for path, module in toy.named_modules()}
    loaded: Any = mx.load(str(file))
    provenance = Provenance()
    toy.load_weights(list(provenance.watch(lambda same: same, loaded).items()))
    entries = {name: (0, entry) for name, entry in read_header(file)[1].items()}
    found = lookup_tables.find_tables(LazyModel(tmp_path, toy, {}, [file], entries, provenance))
    paths = sorted(sorted(table.paths) for table in found)
    pieces = [["pieces.0"], ["pieces.1"], ["pieces.2"]]
    expected = {"rows": [["again", "table"], *pieces], "fails": []}
    assert paths == expected.get(used, pieces)
    assert modules == {path: id(module) for path, module in toy.named_modules()}
    if used == "rows":
        largest = max(found, key=lambda each: each.nbytes)
        assert (largest.rows, largest.nbytes, largest.ids_per_token) == (32, 32 * 64, 1)
        assert [table.ids_per_token for table in found if table is not largest] == [0, 1, 0]


def test_a_table_that_is_changed_while_it_is_loaded_stays_in_memory(model_of: Callable[..., Path]) -> None:
    lazy = open_lazily(model_of("llama"))
    assert [table.paths for table in lookup_tables.find_tables(lazy)] == [["model.embed_tokens"]]
    lazy.model.model.embed_tokens.weight = lazy.model.model.embed_tokens.weight * 2
    assert not lookup_tables.find_tables(lazy)


def test_small_tables_are_not_worth_a_read(model_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    table = 96 * 64 * 4  # bytes
    monkeypatch.setattr(lookup_tables, "LEAST_BYTES", table + 1)
    assert not open_in_place(model_of("llama")).lookup_tables
    monkeypatch.setattr(lookup_tables, "LEAST_BYTES", table)
    (found,) = open_in_place(model_of("llama")).lookup_tables
    assert found.nbytes == table
    monkeypatch.setattr(lookup_tables, "WORTH", 2)  # the copies of a chunk of 512 tokens are larger than the table
    assert not open_in_place(model_of("llama")).lookup_tables


# -- the plan --------------------------------------------------------------------------------------------------------

LARGE = {"vocab_size": 40_000}
LARGE_BYTES = 40_000 * 64 * 4


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("large"), "llama", **LARGE)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Loads the model of a checkpoint with a budget in bytes. The process always has the same size."""
    opened: list[Any] = []
    monkeypatch.setattr(in_place_loading, "process_bytes", lambda: 100_000_000)

    def open_one(folder: Path, memory: int, **options: Any) -> Any:
        given = LoadOptions(threads=4, context=64, memory=memory, prompt_cache=0, **options)
        _, build, *_ = plan_in_place(folder, open_in_place(folder), given)
        opened.append(build(lambda _: None))
        return opened[-1]

    yield open_one
    for model in opened:
        model.flash.close()


def test_rows_are_read_unless_everything_fits(large: Path, load: Callable[..., Any]) -> None:
    expected = reference(large)
    ample = load(large, ENDLESS)
    plan = ample.flash.plan
    assert not streamed(ample) and not plan.reads_rows and plan.demand.table_rows == 0
    assert "table rows" not in plan.describe()
    assert_same(everything(ample), expected, "everything in memory")
    smallest = load(large, plan.smallest)
    assert_same(everything(smallest), expected, "rows are read")
    assert list(streamed(smallest)) == ["model.embed_tokens"]
    least = smallest.flash.plan
    assert least.smallest == plan.smallest and least.total <= plan.smallest < plan.everything - LARGE_BYTES // 2
    assert least.demand.table_rows >= KEPT_SHARE * LARGE_BYTES
    assert re.search(r"table rows .* of a lookup table with 0\.010 GB; the other rows are read", least.describe())
    assert "output head, norms" in least.describe() and "embeddings" not in least.describe()
    assert least.as_dict()["table_rows"] == least.demand.table_rows
    assert least.everything == plan.everything and least.budgets() == plan.budgets()
    parameters: Any = tree_flatten(smallest.parameters())
    assert sum(array.nbytes for _, array in parameters) < LARGE_BYTES * 1.1, "only the output head"


def test_memory_to_spare_holds_more_rows(large: Path, load: Callable[..., Any]) -> None:
    everything_fits = load(large, ENDLESS).flash.plan.everything
    model = load(large, everything_fits - 6 * 10**6)
    plan = model.flash.plan
    assert plan.reads_rows and plan.pinned == len(model.layers) and sum(plan.slots) == plan.units.per_layer
    assert 3 * 10**6 < plan.demand.table_rows < LARGE_BYTES
    assert plan.budget - 1000 < plan.total <= plan.budget
    cache = streamed(model)["model.embed_tokens"].rows.cache
    assert 0.95 < cache.slots * RowCache.slot_bytes(cache.row_bytes) / plan.demand.table_rows <= 1


def test_where_layers_are_read_memory_to_spare_is_left_to_the_chunks_of_a_prompt(tmp_path: Path) -> None:
    sizes = {"vocab_size": 20_000, "num_hidden_layers": 12, "hidden_size": 128, "intermediate_size": 512}
    folder = make_model(tmp_path, "llama", **sizes)
    mixture = open_in_place(folder)

    def plan(memory: int) -> Any:
        return plan_in_place(folder, mixture, LoadOptions(memory=memory, context=64, prompt_cache=0))[0]

    least = plan(plan(ENDLESS).smallest + 3_500_000)
    assert least.reads_rows and 0 < least.pinned < 12 and least.layer_bytes_per_token > 0
    assert least.demand.table_rows == lookup_tables.kept_bytes(mixture.lookup_tables) < least.rows_saved
    assert least.total < least.budget


def test_a_budget_below_the_smallest_is_refused(large: Path, load: Callable[..., Any]) -> None:
    plan = load(large, ENDLESS).flash.plan
    with pytest.raises(BudgetError, match="MB table rows") as caught:
        load(large, plan.smallest - 10**7)
    assert (caught.value.smallest_bytes, caught.value.full_bytes) == (plan.smallest, plan.everything)


# -- checksums, errors and interrupts --------------------------------------------------------------------------------


def test_with_verify_every_row_is_compared(
    tmp_path: Path, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    folder = make_model(tmp_path / "model", "llama", "4 bits", shards=2, vocab_size=200_000)
    expected = reference(folder)
    smallest = load(folder, ENDLESS, verify=True).flash.plan.smallest
    model = load(folder, smallest, verify=True)
    assert_same(everything(model), expected, "compared")
    assert all(file.sums is not None for file in model.flash.streamer.files)
    tensor = streamed(model)["model.embed_tokens"].rows.tensors["scales"]
    path = model.flash.streamer.files[tensor.file].path
    with path.open("r+b") as file:
        file.seek(tensor.begin + 199_990 * tensor.nbytes)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ReadError, match=r"model\.embed_tokens, rows \d+-199999, scales: .* checksum"):
        model(mx.array([[199_999]]))
    assert_same(everything(model), expected, "other rows")


def test_a_truncated_file_is_named(stream: Callable[..., Any], tmp_path: Path) -> None:
    folder = make_model(tmp_path, "gemma3n")
    model, streamer = stream(folder, 0)
    expected = everything(model)
    rows = streamed(model)[TABLES["gemma3n"][0]].rows
    place, path = rows.tensors["weight"], folder / "model.safetensors"
    whole = path.read_bytes()
    os.truncate(path, place.begin + 60 * place.nbytes)
    with pytest.raises(ReadError, match=r"embed_tokens_per_layer, row 6\d, weight: the file ends early"):
        everything(model)
    assert not streamer.reader.outstanding
    path.write_bytes(whole)
    assert_same(everything(model), expected, "afterwards")


@pytest.mark.parametrize("step", [11, slow(1)])
def test_ctrl_c_at_every_line(model_of: Callable[..., Path], stream: Callable[..., Any], step: int) -> None:
    folder = model_of("longcat_flash_ngram")
    model, streamer = stream(folder, 20_000)
    expected = reference(folder)[0]

    def watched(file: str) -> bool:
        return file.endswith(("flash/table_rows.py", "layers/streamed_table.py", "flash/inflight.py"))

    def prompt() -> np.ndarray:
        return np.array(model(mx.array([PROMPT]), cache=make_prompt_cache(model)))

    with InterruptAt(0, watched) as whole:
        prompt()
    assert whole.count > 100
    for line in range(1, whole.count + 1, step):
        with contextlib.suppress(KeyboardInterrupt), InterruptAt(line, watched):
            prompt()
        assert not streamer.reader.outstanding
        assert np.array_equal(prompt(), expected), line


# -- size ------------------------------------------------------------------------------------------------------------


def test_tables_of_30_gb(tmp_path: Path, stream: Callable[..., Any]) -> None:
    """Each of two tables has 38 million rows. Only the rows that a prompt asks for are written."""
    small = make_model(tmp_path / "small", "longcat_flash_ngram")
    ratio, width = 400_000, 96
    folder = tmp_path / "large"
    folder.mkdir()
    config = json.loads((small / "config.json").read_text()) | {"ngram_vocab_size_ratio": ratio}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [ratio * VOCABULARY + 1, ratio * VOCABULARY + 3]
    offsets = write_sparse(folder / "model.safetensors", small / "model.safetensors", rows, width)
    tracemalloc.start()
    try:
        model, streamer = stream(folder, 10_000)
        empty = np.array(model(mx.array([PROMPT])))
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    assert np.isfinite(empty).all()
    tables = [module for path, module in sorted(streamed(model).items()) if "embedders" in path]
    for count, offset, table in zip(rows, offsets, tables, strict=True):
        ids = [3, 77_777, count - 1]
        assert table.rows.count == count and not np.array(table(mx.array(ids[1:]))).any()
        written = np.random.default_rng(count).standard_normal((3, width)).astype(np.float32)
        with (folder / "model.safetensors").open("r+b") as file:
            for row, contents in zip(ids, written, strict=True):
                file.seek(offset + row * width * 4)
                file.write(contents.tobytes())
        found = StreamedTable(nn.Embedding(1, 1), TableRows(streamer, "table", table.rows.tensors, NOTHING_KEPT))
        assert np.array_equal(np.array(found(mx.array(ids))), written)


def write_sparse(target: Path, source: Path, rows: list[int], width: int) -> list[int]:
    """Writes a checkpoint like `source`, but with tables of so many rows, all zeros, which take no room on the disk.

    Returns the tables' offsets.
    """
    header, entries = read_header(source)
    tensors = {name: tensor for name, tensor in json.loads(header[8:]).items() if name != "__metadata__"}
    end, places = 0, []
    for name, tensor in sorted(tensors.items()):
        if (found := re.search(r"embedders\.(\d+)\.weight", name)) is not None:
            tensor["shape"] = [rows[int(found[1])], width]
        nbytes = 4 * int(np.prod(tensor["shape"], dtype=np.int64))
        tensor["data_offsets"] = [end, end + nbytes]
        end += nbytes
    new = json.dumps(tensors).encode()
    with target.open("wb") as file, source.open("rb") as old:
        file.write(len(new).to_bytes(8, "little") + new)
        start = file.tell()
        for name, tensor in sorted(tensors.items()):
            begin = start + tensor["data_offsets"][0]
            if "embedders" in name:
                places.append(begin)
            else:
                old.seek(entries[name].begin)
                file.seek(begin)
                file.write(old.read(entries[name].end - entries[name].begin))
        file.truncate(start + end)
    return places
