"""The kind of a model: a sentence for models of neither kind, and no code from a checkpoint is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, write_tokenizer  # type: ignore[import-not-found]  # found beside this file
from golden_models import GOLDEN  # type: ignore[import-not-found]
from mixtures import VOCABULARY, config_of, make_mixture  # type: ignore[import-not-found]

from mlx_flash.convert.conversion import Settings, convert
from mlx_flash.errors import CheckpointError, UnsupportedModelError
from mlx_flash.loading import load, model_types
from mlx_flash.loading.in_place_model import open_in_place
from mlx_flash.loading.model_types import family_of
from mlx_flash.source import zoos
from mlx_flash.source.model_kind import is_mixture
from mlx_flash.text.tokenizer import load_tokenizer

OWN_CODE = "from pathlib import Path\n\nPath(__file__).with_suffix('.ran').touch()\nModel = ModelArgs = None\n"


@pytest.fixture(params=["mixture", "neurons"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path, tiny: Tiny) -> Path:
    """A checkpoint of either kind beside code of its own, which leaves `own.ran` when it is run."""
    folder = tmp_path / "checkpoint"
    if request.param == "mixture":
        make_mixture(folder, "mixtral")
        write_tokenizer(folder, VOCABULARY)
    else:
        shutil.copytree(tiny.checkpoint, folder)
    (folder / "own.py").write_text(OWN_CODE)
    return folder


def configure(folder: Path, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return config


def run(folder: Path) -> None:
    load.load(folder, context=64)


def run_converter(folder: Path) -> None:
    convert(folder, folder.with_name("store"), Settings(calibration_tokens=64))


TYPES = {json.loads(file.read_text())["model_type"] for file in GOLDEN.glob("*/config.json")} | {"mistral"}
KNOWN = f"ReLU models ({', '.join(sorted(TYPES))})"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"model_type": "qwen2"},
            "X is a dense model (qwen2), which needs no conversion: its layers are streamed. Run it as it is.",
        ),
        (
            {"model_type": "new_moe", "num_experts": 64},
            "knows. mlx-vlm, which is not installed, may know it: `pip install 'mlx-flash-runtime[vlm]'`. "
            f"Two kinds are run: {KNOWN}, and every model that mlx-lm or mlx-vlm knows. The README's section",
        ),
        ({"model_type": "new_moe"}, "X is of model type 'new_moe', which neither mlx_flash nor the installed mlx-lm"),
        ({}, "X is of model type None, which neither"),
        ({"model_type": ["opt"]}, "X is of model type ['opt'], which neither"),
        (config_of("mixtral"), "X is a mixture of experts (mixtral), which needs no conversion. Run it as it is."),
    ],
)
def test_what_is_neither(config: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoos, "mlx_vlm_is_installed", lambda: False)
    monkeypatch.setattr(model_types, "mlx_vlm_is_installed", lambda: False)
    with pytest.raises(UnsupportedModelError) as caught:
        family_of(config, "X")
    assert said in str(caught.value)


@pytest.mark.parametrize("changes", [{"model_type": "unheard_of"}, {"activation_function": "gelu"}])
def test_nothing_is_begun_for_what_is_neither(tiny: Tiny, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(tiny.checkpoint, tmp_path / "checkpoint"))
    configure(folder, **changes)
    told: list[str] = []
    with pytest.raises(UnsupportedModelError, match="which neither mlx_flash nor"):
        load.load(folder, say=told.append)
    assert told == []


@pytest.mark.parametrize("generation_config", ["{}", '{"eos_token_id": 0}'])
def test_a_configuration_that_is_no_object(tiny: Tiny, tmp_path: Path, generation_config: str) -> None:
    folder = Path(shutil.copytree(tiny.checkpoint, tmp_path / "checkpoint"))
    (folder / "config.json").write_text("[]")
    (folder / "generation_config.json").write_text(generation_config)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be used: .*Download the checkpoint again"):
        load.load(folder)


def test_the_section_that_is_pointed_to() -> None:
    assert "## Which models\n" in (Path(__file__).parent.parent / "README.md").read_text()


@pytest.mark.parametrize("entry", [run, run_converter])
@pytest.mark.parametrize("model_type", [None, "no_such_type"])
@pytest.mark.parametrize("file", ["own.py", ["own.py"], ""])
def test_code_that_builds_the_model(
    checkpoint: Path, entry: Callable[[Path], None], model_type: str | None, file: object
) -> None:
    configure(checkpoint, model_file=file, **({} if model_type is None else {"model_type": model_type}))
    with pytest.raises(UnsupportedModelError) as caught:
        entry(checkpoint)
    assert str(caught.value) == (
        f"{checkpoint} cannot be run: its config.json names {file!r}, code in the checkpoint that builds the model, "
        'and code from a checkpoint is never run. The README\'s section "Which models" has the details.'
    )
    assert not list(checkpoint.glob("*.ran"))


def test_mlx_lm_is_not_told_to_trust_code(tmp_path: Path) -> None:
    """Also for callers that have not checked the configuration."""
    folder = make_mixture(tmp_path / "checkpoint", "mixtral")
    (folder / "own.py").write_text(OWN_CODE)
    configure(folder, model_file="own.py")
    with pytest.raises(CheckpointError, match=r"mlx-lm cannot load .*own\.py"):
        open_in_place(folder)
    assert not (folder / "own.ran").exists()


@pytest.mark.parametrize("model_type", ["{folder}/own", "{up}{folder}/own", "..own", "own", "{dots}.own", ".", ""])
def test_a_model_type_that_is_a_path(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    """mlx-lm imports a module by that name. The checkpoint's folder is also the working folder."""
    monkeypatch.chdir(checkpoint)
    up, dots = "../" * 20, str(checkpoint).replace("/", ".")
    config = configure(checkpoint, model_type=model_type.format(folder=checkpoint, up=up, dots=dots))
    assert not is_mixture(config, checkpoint)
    with pytest.raises(UnsupportedModelError):
        run_converter(checkpoint)
    assert not list(checkpoint.glob("*.ran"))


@pytest.mark.parametrize("changes", [{"chat_template_type": "own"}, {"tool_parser_type": "own"}])
def test_code_that_a_tokenizer_names(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, changes: Any) -> None:
    """mlx-lm also imports modules by these names. `auto_map` is transformers' own (test_families.py)."""
    monkeypatch.chdir(checkpoint)
    path = checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=r'cannot be loaded: .* "own", expected the name of'):
        load_tokenizer(checkpoint)
    assert not list(checkpoint.glob("*.ran"))
