"""The synthetic mixture routes as planted and mlx-lm reads it; the comparisons on mixtures report correct figures."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mixtures import choices_seen, make_mixture  # type: ignore[import-not-found]
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from tiny import make_checkpoint  # type: ignore[import-not-found]

from mlx_flash.bench import __main__ as bench
from mlx_flash.bench import bench_model, compare, memory
from mlx_flash.bench.baselines import contenders
from mlx_flash.bench.synthetic.mixture_checkpoint import REPEATED, SHAPES, popularity, write_mixture
from mlx_flash.bench.tools import disk, subprocess_json
from mlx_flash.bench.tools.subprocess_json import KilledError
from mlx_flash.defaults import THREADS
from mlx_flash.errors import UsageError
from mlx_flash.layers import experts as layer_module
from mlx_flash.loading import streaming_needs

pytestmark = pytest.mark.usefixtures("one_processor")


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
    """Checks the routing of every layer in the whole model as mlx-lm computes it."""
    model, config = load_model(checkpoint)
    seen = choices_seen(monkeypatch)
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], 400)
    logits = model(mx.array(ids)[None], cache=make_prompt_cache(model))
    assert np.isfinite(np.array(logits)).all() and len(seen) == 3
    for chosen in seen:
        pairs = zip(chosen[1:], chosen[:-1], strict=True)
        repeated = np.mean([len(np.intersect1d(a, b)) / chosen.shape[1] for a, b in pairs])
        assert abs(repeated - REPEATED) < 0.15


def test_the_products_are_mlx_lms() -> None:
    """The pairs are sorted from the same count on as in mlx-lm. Otherwise the bits would differ on some backends."""
    import inspect

    from mlx_lm.models import switch_layers

    for layer in (switch_layers.SwitchGLU, switch_layers.SwitchMLP):
        assert f"indices.size >= {layer_module.SORTED_FROM}" in inspect.getsource(layer.__call__)


# -- commands ------------------------------------------------------------------------------------------------

STEPS = [
    "every layer whole",
    "only the chosen experts, 1 thread",
    f"+ {THREADS} threads, experts in pieces",
    "+ slots, least-recent use",
    "+ eviction by fading use",
    "+ products while others are read",
    "+ look-ahead, always",
]
Command = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with experts that are large compared with the rounding of a budget."""
    folder = tmp_path_factory.mktemp("synthetic") / "wide"
    shape = replace(SHAPES["tiny"], hidden=512, neurons=512)
    write_mixture(folder, shape, 3, mx.float32, seed=0)
    return folder


@pytest.fixture
def command(wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command. Returns its last line, which is also the file that it wrote."""
    pytest.importorskip("matplotlib")

    def run(name: str, *flags: str) -> dict[str, Any]:
        given = [name, "--model", str(wide), "--prompt", "9", "--tokens", "4", "--output", str(tmp_path), *flags]
        bench.main(bench.make_parser().parse_args(given))
        result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert json.loads((tmp_path / f"{name}-mixture.json").read_text()) == result
        assert (tmp_path / f"{name}-mixture.png").stat().st_size > 10_000
        assert result["model"] == "wide (synthetic weights and routing)"
        return result

    return run


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """Question -> answer, so that a question of two commands is answered once."""
    return {}


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch, answers: dict[str, str]) -> None:
    """Runs the contenders in this process, whose size is made not to matter."""

    def ask(part: str, question: Any, name: str, group: Any = None) -> Any:
        kind, first, second = question
        asked = {key: second[key] for key in ("folder", "ids", "prompt")} if kind == "run" else second
        key = json.dumps((kind, first, asked))
        if key not in answers:
            answers[key] = json.dumps(contenders.respond(*question))
        return json.loads(answers[key])

    monkeypatch.setattr(subprocess_json, "ask", ask)
    monkeypatch.setattr(streaming_needs, "current_memory_bytes", lambda: 100_000_000)
    monkeypatch.setattr(disk, "PIECE_BYTES", 1 << 20)
    monkeypatch.setattr(disk, "RATE_BYTES", 3 << 20)


def test_naive_vs_flash(command: Command) -> None:
    """Runs each contender in a process of its own, as for users."""
    result = command("naive-vs-flash", "--baseline-tokens", "2", "--no-cgroup", "--force")
    rows = result["sides"]
    assert list(rows) == ["resident", "lazy", "naive", "flash"] and not result["left_out"]
    assert [row["tokens"] for row in rows.values()] == [4, 2, 2, 4]
    assert all(row["agreement"] == 1 for row in rows.values())
    assert rows["flash"]["agreement_tokens"] == 5 and len(set(rows["flash"]["likeliest"])) > 1
    assert rows["naive"]["bytes"] >= result["experts_bytes"] > rows["flash"]["bytes"] > 0 == rows["lazy"]["bytes"]
    assert 0.2 < rows["flash"]["slot_share"] < 0.5
    for row in rows.values():
        assert row["first_token_s"] > row["load_s"] + row["prompt"]["total_s"] > row["prompt"]["total_s"] > 0
        if platform.system() == "Linux":
            assert row["written_bytes"] < result["expert_bytes"]
            assert set(row["cached_share_before"].values()) == {0.0}


def test_steps(command: Command, one_process: None) -> None:
    result = command("steps", "--baseline-tokens", "2", "--no-cgroup")
    whole, single, pieces, kept, *rest = result["steps"]
    assert [row["step"] for row in result["steps"]] == STEPS
    assert whole["bytes"] >= result["experts_bytes"] > single["bytes"] > kept["bytes"] > 0
    chosen = result["layers"] * result["choices"] * result["expert_bytes"]
    for row in (single, pieces):
        assert row["hit_rate"] == 0 and chosen <= row["bytes"] < 1.5 * chosen
    assert pieces["slot_share"] < kept["slot_share"] and 0.25 <= kept["slot_share"] < 0.4
    assert pieces["reads"] > single["reads"]
    assert all(row["hit_rate"] > 0 for row in (kept, *rest))
    assert all(row["likeliest"] == single["likeliest"] for row in result["steps"][1:])
    assert whole["likeliest"] == single["likeliest"][:3]


def test_memory(command: Command, one_process: None) -> None:
    result = command("memory", "--points", "3", "--no-cgroup", "--force")
    for way in ("direct", "buffered"):
        rows = [row for row in result["points"] if row["way"] == way]
        assert [row["io"] for row in rows] == [way] * 3
        budgets, hits, shares = ([row[key] for row in rows] for key in ("budget_bytes", "hit_rate", "slot_share"))
        assert hits.pop() is None  # with a slot for each, no expert is looked up
        assert budgets == sorted(set(budgets)) and hits == sorted(hits) and hits[-1] > hits[0]
        assert shares == sorted(set(shares)) and shares[-1] == 1
        assert all(row["likeliest"] == result["all_in_memory"]["likeliest"] for row in rows)
    assert {row["way"] for row in result["points"]} == {"direct", "buffered"}  # nothing bounds the page cache


def test_what_is_killed_is_a_row(command: Command, one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed run gets a row, and "page cache" gets a row if a group limits the page cache."""
    limits: list[int] = []

    class Group:
        def peak_bytes(self) -> int:
            return 1

        def kills(self) -> int:
            return 0

    @contextmanager
    def group(limit: int) -> Iterator[Group]:
        limits.append(limit)
        yield Group()

    def ask(part: str, question: Any, name: str, group: Any = None) -> Any:
        if question[0] == "run" and question[1]["name"] in ("lazy", "naive"):
            raise KilledError("by the test")
        return inner(part, question, name, group)

    inner = subprocess_json.ask
    monkeypatch.setattr(subprocess_json, "ask", ask)
    monkeypatch.setattr(compare, "fence_problem", lambda unwanted: None)
    monkeypatch.setattr(bench_model, "memory_group", group)
    killed = command("naive-vs-flash", "--memory", "260MB", "--sides", "lazy,naive")
    assert killed["ratios"] == {} and [row["kills"] for row in killed["sides"].values()] == [1, 1]
    limits.clear()
    result = command("naive-vs-flash", "--memory", "260MB")
    assert {name: row["killed"] for name, row in result["sides"].items()} == {
        **{"resident": False, "lazy": True},
        **{"naive": True, "flash": False},
    }
    assert limits[0] == limits[2] == 260_000_000 <= limits[1]
    limits.clear()
    result = command("memory", "--points", "2")
    [paged] = [row for row in result["points"] if row["way"] == "page cache"]
    [direct] = [row for row in result["points"] if row["way"] == "direct" and row["slot_share"] == 1]
    assert paged["io"] == "buffered" and paged["budget_bytes"] == paged["limit_bytes"] == direct["budget_bytes"]
    assert paged["slot_share"] < 0.3
    result = command("steps", "--baseline-tokens", "2")
    assert result["steps"][0]["killed"] and len(limits) > 5


def test_slot_counts() -> None:
    assert memory.slot_counts(8, 128, 6) == [1, 8, 16, 32, 64, 128]
    assert memory.slot_counts(8, 128, 2) == [1, 128]
    assert memory.slot_counts(8, 3, 4) == [1, 3]


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("naive-vs-flash", ["--share", "0.5"], "--share cannot be used here: this is a mixture of experts"),
        ("naive-vs-flash", ["--rounds", "2", "--matrices", "here"], "--matrices and --rounds"),
        ("memory", ["--matrices", "here"], "--matrices cannot"),
        ("steps", ["--share", "0.5"], "--share cannot"),
        ("naive-vs-flash", ["--sides", "flash,fast"], "fast unknown, expected some of resident,lazy,naive,flash"),
        ("naive-vs-flash", ["--memory", "10MB"], r"--memory is 10 MB, but the model needs \d+ MB"),
        ("steps", ["--memory", "much"], "memory is 'much'"),
        ("memory", ["--tokens", "40000"], r"the model has 32768 positions. Lower --tokens or --prompt\.$"),
    ],
)
def test_what_cannot_be_used(command: Command, one_process: None, name: str, flags: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        command(name, *flags)


@pytest.mark.parametrize(
    ("name", "flag"),
    [("naive-vs-flash", "--memory"), ("steps", "--memory"), ("naive-vs-flash", "--sides"), ("naive-vs-flash", "--io")],
)
def test_options_of_mixtures_alone(name: str, flag: str) -> None:
    given = [name, flag, "direct"]
    with pytest.raises(UsageError, match=f"{flag} cannot be used here: this is a model that is streamed neuron by"):
        bench.main(bench.make_parser().parse_args(given))


def test_a_model_within_a_larger_one(tmp_path: Path, one_process: None) -> None:
    """The vocabulary and the positions are in the text model's part of config.json."""
    folder = make_mixture(tmp_path / "nested", "qwen3_moe")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_vl_moe", "text_config": config}))
    weights: Any = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), {f"language_model.{k}": v for k, v in weights.items()})
    write_tokenizer(folder)
    given = ["memory", "--model", str(folder), "--prompt", "3", "--tokens", "2", "--no-cgroup"]
    with compare.opened(bench.make_parser().parse_args(given), folder) as model:
        assert model.about["vocabulary"] == config["vocab_size"] > max(model.ids) and len(model.ids) == 5
        assert model.about["positions"] == config["max_position_embeddings"]


def test_expert_reads_need_experts(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    make_checkpoint(tmp_path)
    with pytest.raises(UsageError, match="is not a mixture of experts"):
        bench.main(bench.make_parser().parse_args(["expert-reads", "--model", str(tmp_path)]))
