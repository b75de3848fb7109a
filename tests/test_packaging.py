"""The Homebrew formula, the checks of a release, and the workflows that build, try and release the packages."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

import mlx_flash

ROOT = Path(__file__).parents[1]
WORKFLOWS = ROOT / ".github" / "workflows"
WHEEL = f"mlx_flash_runtime-{mlx_flash.__version__}-py3-none-macosx_14_0_arm64.whl"


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def workflow(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((WORKFLOWS / name).read_text()))


def test_the_formula_of_a_release(tmp_path: Path) -> None:
    wheel = tmp_path / WHEEL
    wheel.write_bytes(b"a wheel")
    command = [sys.executable, str(ROOT / "apps/packaging/fill_formula.py"), str(wheel), "--repository", "OWNER/NAME"]
    formula = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"@\w+@", formula) == []
    url = f"https://github.com/OWNER/NAME/releases/download/v{mlx_flash.__version__}/{WHEEL}"
    assert f'url "{url}"' in formula and f'sha256 "{hashlib.sha256(b"a wheel").hexdigest()}"' in formula
    minor = re.search(r'depends_on "python@(3\.\d+)"', formula)
    assert minor is not None and formula.count(f"python{minor[1]}") == 1  # the program of the same Python
    if ruby := shutil.which("ruby"):
        file = tmp_path / "mlxflash.rb"
        file.write_text(formula)
        subprocess.run([ruby, "-c", str(file)], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("name", "repository"),
    [("mlx_flash_runtime-0.1.0-py3-none-manylinux_2_35_x86_64.whl", "o/n"), (WHEEL, "o/n/x"), (WHEEL, 'o/"n')],
)
def test_a_formula_of_something_else_is_refused(name: str, repository: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match="is not"):
        script("apps/packaging/fill_formula.py").filled(tmp_path / name, repository)


def test_what_keeps_a_tag_from_being_a_release(tmp_path: Path) -> None:
    check = script(".ci/check_release.py")
    root, folder = tmp_path / "root", tmp_path / "release"
    (root / "mlx_flash").mkdir(parents=True)
    folder.mkdir()
    (root / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    (root / "mlx_flash/__init__.py").write_text('__version__ = "1.2.3"\n')
    (root / "CHANGELOG.md").write_text("# Changes\n\n## 1.2.3 (2026-12-01)\n")
    for name in check.PACKAGES:
        (folder / name.format("1.2.3")).touch()
    assert check.wrong("v1.2.3", folder, root) == []
    (folder / "more.whl").touch()
    (root / "mlx_flash/__init__.py").write_text('__version__ = "1.2.2"\n')
    (root / "CHANGELOG.md").write_text("# Changes\n\n## Unreleased\n\n1.2.3\n")
    found = check.wrong("v1.2.4", folder, root)
    assert [re.sub(r"\W.*", "", sentence.removeprefix("the ")) for sentence in found] == [
        "tag",
        "mlx_flash",
        "CHANGELOG",
        "missing",
    ]


def test_every_package_is_tried() -> None:
    """Each artifact that a job uploads is one that a job installs, on the system that it is for."""
    jobs = workflow("wheels.yml")["jobs"]
    made = set()
    for name in ("source", "macos", "linux"):
        steps = [step["with"]["name"] for step in jobs[name]["steps"] if "upload-artifact" in step.get("uses", "")]
        rows = jobs[name].get("strategy", {}).get("matrix", {}).get("include", [{}])
        for name_of_package in steps:
            made |= {re.sub(r"\$\{\{ matrix\.processor }}", str(row.get("processor")), name_of_package) for row in rows}
    tried = jobs["try"]["strategy"]["matrix"]["include"]
    assert {f"package-{row['package']}" for row in tried} == made and len(made) == 4
    assert {row["how"] for row in tried} == {"pip", "pipx", "uv"}
    for row in tried:
        system = {"macos-arm64": "macos", "linux-x86_64": "ubuntu", "linux-aarch64": "ubuntu"}.get(row["package"], "")
        assert row["runner"].startswith(system) and row["runner"].endswith("-arm") == ("aarch64" in row["package"])
    assert jobs["try"]["steps"][-1]["run"] == '.ci/try_package package/* "$HOW"'
    packages = script(".ci/check_release.py").PACKAGES
    assert {"source", "macos-arm64", "linux-x86_64", "linux-aarch64"} == {row["package"] for row in tried}
    assert [name for name in packages if "aarch64" in name] and len(packages) == len(made)


def test_nothing_is_published_unless_a_maintainer_turns_it_on() -> None:
    release = workflow("release.yml")
    jobs = release["jobs"]
    assert release["permissions"] == {"contents": "read"}
    assert jobs["publish"]["if"] == "vars.PUBLISH_TO_INDEX == 'true'" and jobs["publish"]["needs"] == "release"
    assert jobs["release"]["if"] == "github.ref_type == 'tag'" and jobs["release"]["needs"] == "packages"
    assert jobs["packages"]["uses"] == "./.github/workflows/wheels.yml"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}  # trusted publishing, without a token
    assert "secrets." not in (WORKFLOWS / "release.yml").read_text()


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.yml")), ids=lambda path: path.name)
def test_scripts_and_files_of_a_workflow_exist(path: Path) -> None:
    jobs = yaml.safe_load(path.read_text())["jobs"]
    for job in jobs.values():
        for step in job.get("steps", []):
            assert "${{" not in step.get("run", "")  # what a branch or tag is called is not a command
            for name in re.findall(r"(?:\.ci|apps|tests)/[\w./]+", step.get("run", "")):
                assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", ["run", "try_package", "try_service"])
def test_scripts_can_be_started(name: str) -> None:
    path = ROOT / ".ci" / name
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(path)], check=True)
