"""The benchmark of several requests at once, on a tiny random Llama."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest

from mlx_flash.bench import __main__ as bench
from mlx_flash.bench.synthetic.dense_checkpoint import write_dense


@pytest.mark.skipif(platform.system() != "Linux", reason="reads are paced by a library that Linux preloads")
def test_rows_share_what_a_step_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    write_dense(tmp_path / "model", "tiny", 6, "4bit", 0)
    (tmp_path / "text").write_text("the dog and the man went down to the river again " * 20)
    arguments = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text"), "--share", "0"]
    sizes = ["--rows", "1,2", "--requests", "3", "--prompt-tokens", "8", "--tokens", "4", "--rate", "1000"]
    parsed = bench.make_parser().parse_args(["together", *arguments, *sizes])
    parsed.run(parsed)
    one, two = json.loads(capsys.readouterr().out.splitlines()[-1])["table"]
    assert (one["tokens"], two["tokens"]) == (12, 12)
    assert (one["steps"], two["steps"]) == (12, 8)  # the third request waits for a row
    assert one["times_one"] == 1 and two["times_one"] > 0
    assert two["bytes_per_token"] <= one["bytes_per_token"]
