"""The jobs of .github/workflows/ci.yml on the machines that this suite does not run on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

WORKFLOW = Path(__file__).parents[1] / ".github" / "workflows" / "ci.yml"


@pytest.fixture(scope="module")
def jobs() -> dict[str, Any]:
    return dict(yaml.safe_load(WORKFLOW.read_text())["jobs"])


def steps_of(job: dict[str, Any], command: str) -> list[dict[str, Any]]:
    """The steps that run this command. None of them may be skipped or fail unnoticed."""
    found = [step for step in job["steps"] if command in step.get("run", "")]
    for settings in (job, *found):
        assert not {"if", "continue-on-error"} & set(settings)
    return found


def device_of(job: dict[str, Any], step: dict[str, Any], command: str) -> str | None:
    """The device that MLX_FLASH_TEST_DEVICE sets for the command, on its line or in its environment."""
    name = "MLX_FLASH_TEST_DEVICE"
    for line in step["run"].splitlines():
        before, found, _ = line.partition(command)
        if found and f"{name}=" in before:
            return str(before.split(f"{name}=")[1].split()[0])
    device = {**job.get("env", {}), **step.get("env", {})}.get(name)
    return None if device is None else str(device)


def test_the_suite_runs_on_the_cpu_of_a_mac(jobs: dict[str, Any]) -> None:
    job = jobs["macos"]
    assert job["runs-on"].startswith("macos-")
    (suite,) = steps_of(job, ".ci/run")
    assert device_of(job, suite, ".ci/run") == "cpu"


def test_what_metal_must_show_runs_on_its_gpu(jobs: dict[str, Any]) -> None:
    """The step fails if the tests would be skipped."""
    job = jobs["macos"]
    (step,) = steps_of(job, "pytest -m metal")
    assert device_of(job, step, "pytest") is None
    commands = [line.strip() for line in step["run"].splitlines()]
    (check,) = [line for line in commands if "assert mx.metal.is_available()" in line]
    assert commands.index(check) < commands.index(".venv/bin/pytest -m metal")


def test_the_suite_runs_on_linux(jobs: dict[str, Any]) -> None:
    assert len(steps_of(jobs["linux"], ".ci/run")) == 1
