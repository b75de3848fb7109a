"""The same text at every real budget, each in a process, for a checkpoint that is large compared with the process."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PREDICTORS, write_tokenizer  # type: ignore[import-not-found]  # found beside this file
from tiny import make_checkpoint  # type: ignore[import-not-found]

from mlx_flash.convert.conversion import Settings, convert

pytestmark = pytest.mark.slow

LAYERS, HIDDEN, NEURONS = 16, 1024, 6144  # 0.8 GB of neurons in float32

# A prompt of 20 tokens, 20 more one by one, then text. Prints a digest of logits and tokens, and the plan.
PROGRAM = """
import hashlib, json, sys
import mlx.core as mx, numpy as np
import mlx_flash
from mlx_lm.models.cache import make_prompt_cache
store, options = sys.argv[1], json.loads(sys.argv[2])
model, tokenizer = mlx_flash.load(store, context=256, **options)
tokens = mx.array(np.random.default_rng(0).integers(4, 96, (1, 40)))
cache = make_prompt_cache(model)
mx.eval(model(tokens[:, :20], cache=cache))
logits = [np.array(model(tokens[:, i : i + 1], cache=cache)).tobytes() for i in range(20, 40)]
del cache  # The plan makes room for one context.
for response in mlx_flash.stream_generate(model, tokenizer, "Once upon a time", max_tokens=12):
    logits.append(str(response.token).encode())
plan = model.flash.plan
print(json.dumps({"digest": hashlib.sha256(b" ".join(logits)).hexdigest(),
                  "share": max(plan.slots) / plan.units.per_layer,
                  "peak": response.peak_memory * 1e9, "planned": plan.total}))
"""


@pytest.fixture(scope="module")
def large_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    checkpoint = make_checkpoint(
        folder / "checkpoint", layers=LAYERS, hidden=HIDDEN, neurons=NEURONS, positions=512, bias=-1.6
    )
    write_tokenizer(checkpoint)
    convert(checkpoint, folder / "store", Settings(calibration_tokens=256))
    return folder / "store"


def run(store: Path, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, str(store), json.dumps(options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_same_logits_and_text_within_the_plan(large_store: Path, predictor: str) -> None:
    refused = run(large_store, predictor=predictor, memory=1)
    found = re.search(r"needs at least (\d+)MB", refused.stderr)
    assert found is not None, refused.stderr
    least = int(found[1]) * 10**6
    results = []
    for memory, window, threads in (
        (least, 1, 1),
        (least + 200_000_000, 8, 16),
        (least + 500_000_000, None, 16),
        (None, None, 16),
    ):
        done = run(large_store, predictor=predictor, memory=memory, window=window, threads=threads)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    assert len({result["digest"] for result in results}) == 1
    assert all(result["peak"] <= result["planned"] for result in results)
    shares = [result["share"] for result in results]
    assert shares == sorted(shares) and shares[0] < 0.1 and shares[-1] == 1
