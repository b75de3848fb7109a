"""--hosts and --ranks: the text of several ranks, and a server whose rank ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest
from processes import has_ended, runs  # type: ignore[import-not-found]  # found beside this file
from rank_faults import tiny_mixture  # type: ignore[import-not-found]  # found beside this file
from serving import PATIENCE_S, until  # type: ignore[import-not-found]
from test_server_process import ready, started  # type: ignore[import-not-found]

from mlx_flash.chat import make_parser
from mlx_flash.cli.rank_arguments import ranks_of
from mlx_flash.errors import UsageError
from mlx_flash.loading.options import LoadOptions
from mlx_flash.server.engine import Engine
from mlx_flash.server.library import Library
from mlx_flash.source.installed import folder_model


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny_mixture(tmp_path_factory.mktemp("mixture")))


def answer(model: Path, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "mlx_flash.generate", "--model", str(model), "--memory", "1GB", "-m", "8"]
    flags = ["--temp", "0", "--json", *more]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_two_ranks_say_the_same(mixture: Path) -> None:
    alone, two = answer(mixture), answer(mixture, "--ranks", "2")
    assert two["tokens"] == alone["tokens"] and alone["ranks"] is None
    assert two["ranks"]["wait_s"] > 0 and two["ranks"]["bytes_per_token"] == 0  # all in slots


def test_a_rank_that_ends_ends_the_server_and_its_streams(mixture: Path) -> None:
    body = {"prompt": [7, 8, 9], "max_tokens": 400, "stream": True, "logit_bias": {"1": -100, "0": -100}}
    with started("--model", str(mixture), "--memory", "1GB", "--ranks", "2") as (process, url):
        until(lambda: ready(url))
        (rank,) = [each for each in psutil.Process(process.pid).children() if runs(each, "mlx_flash.rank")]
        stream = httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=PATIENCE_S, verify=False)
        with stream as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            rank.kill()
            rest = [line for line in lines if line]
        _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1 and "Traceback" not in errors, errors
    assert "rank 1 (127.0.0.1) was ended by SIGKILL" in errors.splitlines()[-1]
    assert any("rank 1 (127.0.0.1)" in line for line in rest[-2:]), rest[-2:]
    assert has_ended(rank)


def test_the_flags_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--ranks", "2", "--hosts", "FILE"], ["--ranks", "1"]):
        with pytest.raises(SystemExit):
            make_parser().parse_args(flags)
    assert "not allowed with" in capsys.readouterr().err


def test_a_host_file_that_is_missing(tmp_path: Path) -> None:
    arguments = make_parser().parse_args(["--hosts", str(tmp_path / "none.json")])
    with pytest.raises(UsageError, match=r"mlx\.distributed_config"), ranks_of(arguments, "mlxflash chat"):
        pass


def test_ranks_with_a_model_of_their_own_load_no_other(mixture: Path) -> None:
    class Group:
        with_own_model = ("mac2",)

    library: Any = Library(Engine("own", str(mixture)), ("own",), str(mixture), LoadOptions())
    library.group = Group()
    load: Callable[..., Any] = library._loader(folder_model("other", mixture), None, False)
    with pytest.raises(UsageError, match="the folder of the model on mac2"):
        load(lambda *_: None)
