"""Loading a mixture over several ranks: what is asked and refused, how it is divided, and the plan that is printed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mixtures import make_mixture  # type: ignore[import-not-found]
from ranks_double import ThreadRank, ranks_as_threads  # type: ignore[import-not-found]
from test_mixture import assert_same, everything  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.errors import BudgetError, CheckpointError, FlashError, UsageError
from mlx_flash.loading.other_rank import register
from mlx_flash.loading.rank_questions import checksum_of, compare
from mlx_flash.loading.rank_shares import Capacity, slots_of_layers, units_of_layers, units_of_ranks
from mlx_flash.ranks.group import Handlers
from mlx_flash.source.children import child_environment

pytestmark = pytest.mark.usefixtures("one_processor")


SIZES = {"num_experts": 64, "moe_intermediate_size": 512, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of 400 KB, so that a few MB more or less hold a share of them."""
    path = make_mixture(tmp_path_factory.mktemp("mixture"), "qwen3_moe", **SIZES)
    write_tokenizer(path)
    return path


@contextmanager
def group_of(models: Sequence[Any], memory: Sequence[Any]) -> Iterator[ThreadRank]:
    """Rank 0's group. models, memory: what the host file says for the other ranks."""
    loading = threading.Lock()  # Loading changes settings of the process.

    def one_at_a_time(answer: Any) -> Any:
        def answered(value: Any) -> Any:
            with loading:
                return answer(value)

        return answered

    def prepare(group: ThreadRank, handlers: Handlers) -> None:
        register(group, handlers, models[group.rank - 1], memory[group.rank - 1])
        for name, answer in list(handlers.questions.items()):
            handlers.questions[name] = one_at_a_time(answer)

    with ranks_as_threads(1 + len(models), prepare) as group:
        yield group


def smallest_of(folder: Path) -> int:
    return mlx_flash.plan(folder, memory=2**60, context=64).smallest


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[np.ndarray]:
    model, _ = mlx_flash.load(folder, memory="1GB", context=64, trials=False)
    found = everything(model)
    model.flash.close()
    return found


def test_a_mixture_is_divided_and_has_the_bits_of_one_rank(folder: Path, expected: list[np.ndarray]) -> None:
    """Once with a slot for every expert, and once with few slots everywhere."""
    said: list[str] = []
    with group_of([None, str(folder)], [None, "210MB"]) as group, pytest.raises(FlashError) as refused:
        mlx_flash.load(folder, memory="1GB", context=64, group=group)
    fewest = int(re.findall(r"at least (\d+)MB", str(refused.value))[0])
    for memory, own in (("1GB", None), (smallest_of(folder) + 20_000_000, f"{fewest + 6}MB")):
        with group_of([None, str(folder)], [own, own]) as group:
            model, _ = mlx_flash.load(folder, memory=memory, context=64, say=said.append, group=group, trials=False)
            assert_same(everything(model), expected, memory)
            assert group.calls_made
            held = [layer.units.count for layer in model.flash.layers]
            assert max(held) < 64 and model.flash.layers[0].units.all_resident == (own is None)
            model.flash.close()
            with pytest.raises(FlashError, match="not known here"):
                group.ask({"nothing": 1})
    fits, few = (text.splitlines()[-3:] for text in said if text.startswith("memory plan"))
    for rank, lines in enumerate(zip(fits, few, strict=True)):
        for line in lines:
            assert re.match(rf"  rank {rank} .* GB  \S+: \d.* experts of each layer \(\d+%\), ", line), line
        assert lines[0].endswith("all in slots") and "% of them in slots; its disk reads" in lines[1]


@pytest.mark.parametrize(
    "options", [{"draft": "ngram"}, {"parallel": 2}, {"verify": True}, {"threads": 2, "window": 4}]
)
def test_options(folder: Path, options: dict[str, Any]) -> None:
    """The text is that of one rank. A text is longer than its prompt, so that drafts repeat it."""
    texts = []
    with group_of([None], [None]) as group:
        for ranks in (None, group):
            model, tokenizer = mlx_flash.load(folder, memory="1GB", context=256, group=ranks, **options)
            texts.append(mlx_flash.generate(model, tokenizer, "abcabcabc", max_tokens=24))
            model.flash.close()
    assert texts[0] == texts[1] and texts[0]


def test_several_processes(folder: Path, expected: list[np.ndarray], tmp_path: Path) -> None:
    """MLX's ring, and `python -m mlx_flash.rank`, which the test itself cannot lead: a process joins one ring."""
    command = [sys.executable, str(Path(__file__).with_name("ranked_program.py")), str(folder), str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=child_environment())
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "found.npz") as found:
        assert_same([found[name] for name in found.files], expected, "two processes")
    assert "rank 1" in done.stdout


def test_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    refused = pytest.raises(FlashError, match=r"rank 2: .*other is not the model that rank 0 has.*Copy")
    with group_of([None, str(other)], [None, None]) as group, refused:
        mlx_flash.load(folder, memory="1GB", context=64, group=group)
    refused = pytest.raises(FlashError, match=r"rank 1: .*nowhere.*neither a folder")
    with group_of([str(tmp_path / "nowhere")], [None]) as group, refused:
        mlx_flash.load(folder, memory="1GB", context=64, group=group)


def test_a_shard_with_another_header_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    weights: Any = mx.load(str(other / "model.safetensors"))
    weights["lm_head.weight"] = weights["lm_head.weight"].astype(mx.bfloat16)
    mx.save_safetensors(str(other / "model.safetensors"), weights)
    with group_of([str(other)], [None]) as group, pytest.raises(FlashError, match="or its weights differ"):
        mlx_flash.load(folder, memory="1GB", context=64, group=group)


def test_other_weights_under_the_same_header_are_refused(folder: Path, tmp_path: Path) -> None:
    """Two trainings of one architecture have the same configuration and headers."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert checksum_of(other) != checksum_of(folder)
    with pytest.raises(CheckpointError, match="is not the model that rank 0 has"):
        compare(other, checksum_of(folder))


def test_a_budget_that_is_too_small_is_refused_by_its_rank(folder: Path) -> None:
    with group_of([None, None], [None, "210MB"]) as group:
        with pytest.raises(FlashError, match=r"rank 2: this model needs at least \d+MB.*host file: \d+MB"):
            mlx_flash.load(folder, memory="1GB", context=64, group=group)
        with pytest.raises(BudgetError):  # rank 0's own
            mlx_flash.load(folder, memory="210MB", context=64, group=group)
        with pytest.raises(FlashError, match=r"rank 1: .*'lots'|lots"):
            mlx_flash.load(folder, memory="lots", context=64, group=group)


def test_more_ranks_than_experts_are_refused(tmp_path: Path) -> None:
    path = make_mixture(tmp_path / "few", "qwen3_moe", num_experts=2, num_experts_per_tok=1)
    write_tokenizer(path)
    refused = pytest.raises(UsageError, match="3 ranks, but a layer has only 2 experts")
    with group_of([None, None], [None, None]) as group, refused:
        mlx_flash.load(path, memory="1GB", context=64, group=group)


def test_a_rank_that_cannot_load_its_share_ends_the_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_flash.loading import experts_of_rank

    def failing(*_: object, **__: object) -> None:
        raise FlashError("injected")

    with group_of([None], [None]) as group:
        with monkeypatch.context() as patched:
            patched.setattr(experts_of_rank, "fill_slots", failing)
            with pytest.raises(FlashError, match="rank 1: injected"):
                mlx_flash.load(folder, memory="1GB", context=64, group=group)
        model, _ = mlx_flash.load(folder, memory="1GB", context=64, group=group)  # the next load succeeds
        model.flash.close()


# -- shares ----------------------------------------------------------------------------------------------------------


def rank(slots: int, rate: float = 0.0) -> Capacity:
    return Capacity("host", 10**9, slots, rate)


def test_shares_follow_slots_and_disks() -> None:
    assert units_of_ranks(100, [rank(100), rank(100)]) == [50, 50]
    assert units_of_ranks(100, [rank(300), rank(50)]) == pytest.approx([100 * 100 / 150, 100 * 50 / 150])
    assert units_of_ranks(100, [rank(20, 1e9), rank(40, 3e9)]) == pytest.approx([30, 70])
    assert units_of_ranks(100, [rank(20), rank(40)]) == pytest.approx([40, 60])  # rates that are not known


def test_layers_are_divided_as_wanted() -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        ranks, layers = int(rng.integers(1, 5)), [int(rng.integers(8, 130))] * int(rng.integers(1, 40))
        wanted = rng.random(ranks) + 1.0
        wanted *= sum(layers) / wanted.sum()
        counts = units_of_layers(layers, wanted.tolist())
        assert [sum(each) for each in counts] == layers and min(map(min, counts)) >= 1
        for of_layer in counts:
            assert np.abs(np.array(of_layer) - wanted / len(layers)).max() < 2
        assert np.abs(np.array(counts).sum(0) - wanted).max() < 1.01
    assert units_of_layers([4, 4], [8.0, 0.0]) == [[3, 1], [3, 1]]  # every rank has a part


def test_slots_of_layers() -> None:
    assert slots_of_layers(100, [3, 4, 3]) == [3, 4, 3]
    assert slots_of_layers(8, [3, 4, 3]) == [3, 3, 2]
    assert slots_of_layers(3, [3, 4, 3]) == [1, 1, 1]
    assert slots_of_layers(9, [1, 9, 9]) == [1, 4, 4]
