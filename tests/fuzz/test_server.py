"""Runs schemathesis on the server: pip install schemathesis; pytest -m fuzz tests/fuzz/test_server.py

Sends EXAMPLES requests that fit the models, and as many that do not, to each path. No answer may be a server error,
each must match the description, and the log must stay empty.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from openapi import description  # type: ignore[import-not-found]
from serving import serving  # type: ignore[import-not-found]

EXAMPLES = int(os.environ.get("MLX_FLASH_FUZZ_EXAMPLES", "50"))
BESIDE_PYTHON = Path(sys.executable).with_name("schemathesis")
SCHEMATHESIS = os.environ.get("SCHEMATHESIS") or shutil.which("schemathesis") or BESIDE_PYTHON

pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.skipif(not Path(SCHEMATHESIS).exists(), reason="no schemathesis: pip install schemathesis"),
]


def test_no_request_gives_a_server_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    schema = tmp_path / "openapi.json"
    schema.write_text(json.dumps(description()))
    checks = (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
    )
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    with serving() as server:
        command = [str(SCHEMATHESIS), "run", str(schema), "--url", server.url, "--phases", "examples,coverage,fuzzing"]
        command += ["--max-examples", str(EXAMPLES), "--checks", ",".join(checks), "--mode", "all", "--no-color"]
        command += ["--seed", "1", "--generation-deterministic", "--request-timeout", "600", "--continue-on-failure"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        server.idle()
        assert server.get("/health").status_code == 200
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr
    assert caplog.text == ""
