"""Errors of other libraries end in one sentence: on the command line, in the server, and in the menu bar app."""

from __future__ import annotations

import argparse
import errno
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from tiny import make_checkpoint  # type: ignore[import-not-found]

from mlx_flash.apps.menubar.server_process import why_it_ended
from mlx_flash.cli.run import run_command
from mlx_flash.convert import __main__ as convert_command
from mlx_flash.errors import ReadError
from mlx_flash.flash.plain_files import reading
from mlx_flash.server.engine import Engine
from mlx_flash.server.jobs import Job, Sampling
from mlx_flash.server.loaded_model import LoadedModel
from mlx_flash.source.failures import REPORT
from mlx_flash.text import cached_context
from mlx_flash.text import prompt_cache as turns_module
from mlx_flash.text.prompt_cache import ReusedPromptCache

METAL = "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackError)"
MEMORY = "there is not enough memory: "
REMEDY = "Lower --memory or --context, or close other programs."


@pytest.fixture
def end_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[Exception], tuple[int, str]]:
    """(exit code, standard error) of a command that raises this error."""
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.argv", ["program", "--secret", "a prompt"])

    def run(error: Exception) -> tuple[int, str]:
        parser = argparse.ArgumentParser("program")
        parser.add_argument("--secret")

        def main(_: argparse.Namespace) -> None:
            raise error

        with pytest.raises(SystemExit) as caught:
            run_command(parser, main)
        assert isinstance(caught.value.code, int)
        return caught.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(METAL),
        RuntimeError("std::bad_alloc"),
        RuntimeError("[malloc] Unable to allocate 17179869184 bytes."),
        RuntimeError("[metal::malloc] Attempting to allocate 1 bytes which is greater than the maximum allowed buffer"),
        MemoryError(),
    ],
    ids=str,
)
def test_too_little_memory_is_a_sentence(end_with: Callable[[Exception], tuple[int, str]], error: Exception) -> None:
    code, said = end_with(error)
    assert code == 1
    assert said.startswith(f"program: {MEMORY}") and said.endswith(f"{REMEDY}\n") and said.count("\n") == 1


def test_another_error_of_the_gpu_is_a_sentence(end_with: Callable[[Exception], tuple[int, str]]) -> None:
    code, said = end_with(RuntimeError("[METAL] Command buffer execution failed: Caused GPU Hang Error."))
    assert (code, said.count("\n")) == (1, 1)
    assert said.startswith("program: the GPU reports an error: [METAL]")


@pytest.mark.parametrize("error", [RuntimeError("std::bad_cast"), KeyError("x"), AssertionError()], ids=repr)
def test_what_nobody_foresaw_is_a_sentence_that_says_where_the_traceback_is(
    end_with: Callable[[Exception], tuple[int, str]], tmp_path: Path, error: Exception
) -> None:
    code, said = end_with(error)
    report = tmp_path / "cache" / REPORT
    assert (code, said.count("\n")) == (1, 1)
    assert said.startswith("program: unexpected error: ") and f"traceback is in {report}." in said
    text = report.read_text()
    assert "raise error" in text and type(error).__name__ in text and f"mlx {version('mlx')}" in text
    assert "a prompt" not in text


def test_the_traceback_is_printed_where_it_cannot_be_written(
    end_with: Callable[[Exception], tuple[int, str]], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("in the way")
    code, said = end_with(RuntimeError("odd"))
    assert code == 1
    assert "Traceback" in said and said.splitlines()[-1].startswith("program: unexpected error: odd. Its")


def test_the_menu_bar_app_shows_that_sentence() -> None:
    lines = ["loading", f"python -m mlx_flash.server: {MEMORY}{METAL}. {REMEDY}"]
    assert why_it_ended(1, lines) == f"{MEMORY}{METAL}. {REMEDY}"


@pytest.mark.parametrize(
    ("error", "said"),
    [(RuntimeError(METAL), f"{MEMORY}.*{REMEDY}"), (KeyError("x"), "KeyError: 'x'; the server's log")],
)
def test_the_server_answers_500_with_a_sentence(error: Exception, said: str) -> None:
    engine = Engine("some", "")
    told: list[Any] = []
    engine.switch.loaded = LoadedModel(None, None, monitor=MagicMock())
    engine._generate = MagicMock(side_effect=error)  # type: ignore[method-assign]
    engine._serve(Job(ids=[1], max_tokens=1, sampling=Sampling(), tell=told.append))
    (answer,) = told
    assert answer.status == 500
    with pytest.raises(type(answer), match=f"this request failed: {said}"):
        raise answer


@pytest.mark.parametrize("key", ["num_attention_heads", "ffn_dim", "num_hidden_layers"])
def test_a_float_where_a_whole_number_belongs_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: float(config[key])}))
    monkeypatch.setattr("sys.argv", ["convert", "--model", str(folder), "--output", str(tmp_path / "store")])
    with pytest.raises(SystemExit) as caught:
        run_command(convert_command.make_parser(), convert_command.main)
    said = capsys.readouterr().err
    assert caught.value.code == 1 and said.count("\n") == 1
    assert f"config.json does not describe a model: {key} is {float(config[key])}, expected a whole number" in said
    assert not list(tmp_path.glob("store*"))


def test_a_conversation_whose_cache_could_not_grow_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX treats an array that it failed to make as a finished one, so its contents must not be used."""
    model = MagicMock()
    model.flash.plan.context, model.flash.plan.demand.prompt_caches = 64, 0
    monkeypatch.setattr(turns_module, "make_prompt_cache", lambda _: [])
    monkeypatch.setattr(cached_context, "make_room", MagicMock(side_effect=RuntimeError(METAL)))
    conversation = ReusedPromptCache(model)
    before = list(range(20))
    conversation._last.decode(before)
    tokenizer: Any = None
    with pytest.raises(RuntimeError, match="METAL"):
        conversation.stream_generate(tokenizer, [*before, 4])
    assert conversation.tokens == []


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (FileNotFoundError(2, "No such file or directory"), "If it is on another volume, connect that."),
        (NotADirectoryError(20, "Not a directory"), "Check the name."),
        (IsADirectoryError(21, "Is a directory"), "Name a file."),
        (PermissionError(13, "Permission denied"), "Give this user the right to read it."),
        (OSError(5, "Input/output error"), "copy the file from a sound disk."),
        (OSError(errno.ENXIO, "Device not configured"), "A server loads the model again by itself."),
        (OSError(errno.ESTALE, "Stale file handle"), "A server loads the model again by itself."),
        (OSError(errno.ETIMEDOUT, "Operation timed out"), "A server loads the model again by itself."),
        (EOFError("it ends at byte 3"), "Copy it again."),
    ],
)
def test_the_remedy_suits_the_error(error: Exception, remedy: str) -> None:
    with pytest.raises(ReadError, match=f"^photo.jpg cannot be read: .*{remedy}$"), reading(Path("photo.jpg")):
        raise error
