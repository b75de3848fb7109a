"""Random faults of ranks, the same in every run. `python tests/rank_faults.py --rounds 20` injects others."""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_faults import MOST_S, RankFault, inject, random_faults, tiny_mixture  # type: ignore[import-not-found]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_mixture(tmp_path_factory.mktemp("model")))


@pytest.mark.faults
@pytest.mark.parametrize("fault", random_faults(12), ids=str)
def test_a_fault_of_a_rank_ends_all(fault: RankFault, model: Path) -> None:
    found = inject(model, fault)
    assert not found.problem(fault), found
    assert found.seconds <= MOST_S[fault.moment]
