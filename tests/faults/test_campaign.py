"""A few faults of each job, the same in every run. `campaign.py` injects as many as you like."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from slow_cases import slow  # type: ignore[import-not-found]
from tiny import make_checkpoint  # type: ignore[import-not-found]

from mlx_flash.convert.conversion import Settings, convert

sys.path.insert(0, str(Path(__file__).parent))

from campaign import BAD, run  # type: ignore[import-not-found]  # found beside this file

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="the shim needs Linux and a C compiler"
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def model(work: Path) -> Path:
    """A store that takes a fraction of the demo's time per token, with too little memory for all of it."""
    checkpoint = make_checkpoint(work / "checkpoint", hidden=256, neurons=2048, positions=128)
    write_tokenizer(checkpoint)
    convert(checkpoint, work / "small", Settings(calibration_tokens=128, predictor_memory=1 << 20))
    return work / "small"


@pytest.mark.parametrize(
    ("job", "runs"),
    [
        ("decode", 4),
        ("load", 4),
        ("convert-partial", 3),
        slow("decode", 40),
        slow("load", 40),
        slow("convert-partial", 20),
    ],
)
def test_a_fault_ends_in_the_right_text_or_in_an_error_that_names_a_file(
    job: str, runs: int, tmp_path: Path, model: Path
) -> None:
    counts, bad = run(job, runs, 0, tmp_path, model)
    assert not bad
    assert counts["right"] + counts["clear"] > 0
    assert not any(counts[name] for name in BAD)
