"""Repositories of the Hub: only needed files are fetched, downloads resume, and failures give a clear sentence."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from hub_server import Hub, serve  # type: ignore[import-not-found]
from huggingface_hub import close_session, constants
from huggingface_hub import errors as hub_errors
from tiny import make_checkpoint  # type: ignore[import-not-found]

from mlx_flash.convert.conversion import Settings, convert
from mlx_flash.errors import CheckpointError, ConversionError, FlashError, NoSpaceError, UsageError
from mlx_flash.source import hub, hub_listing
from mlx_flash.source.cached import entries
from mlx_flash.source.checkpoint_files import weight_files

REPOSITORY = "owner/tiny"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
CLUTTER = {
    "pytorch_model.bin": b"the same once more",
    "pytorch_model.bin.index.json": b"{}",
    "flax_model.msgpack": b"x",
    "tf_model.h5": b"x",
    "tiny.gguf": b"x",
    "original/params.json": b"{}",
    "original/model.safetensors": b"x",
    "consolidated.00.pth": b"x",
    "consolidated.safetensors": b"x",
    "onnx/model.onnx": b"x",
    "README.md": b"# Tiny",
    ".gitattributes": b"",
}
PIECE = 10 << 20  # huggingface_hub writes pieces of this size

FIND = """
import argparse, sys, time
from mlx_flash.cli.run import run_command
from mlx_flash.convert.imported import find_predictors
from mlx_flash.source.resolve import find_checkpoint
time.sleep = lambda _: None  # between tries
parser = argparse.ArgumentParser(prog="find")
parser.add_argument("model")
parser.add_argument("--revision")
parser.add_argument("--predictors", action="store_true")
def say(text):
    print(text, file=sys.stderr)
def main(arguments):
    if arguments.predictors:
        print(find_predictors(arguments.model, say))
    else:
        print(find_checkpoint(arguments.model, arguments.revision, say))
run_command(parser, main)
"""

CONVERT = """
from mlx_flash.cli.run import run_command
from mlx_flash.convert.__main__ import main, make_parser
run_command(make_parser(), main)
"""


@pytest.fixture
def server() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


@pytest.fixture(scope="module", autouse=True)
def close_connections() -> Iterator[None]:
    yield
    close_session()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in two shards, with all the small files that a checkpoint may have."""
    folder = make_checkpoint(tmp_path_factory.mktemp("hub") / "tiny", neurons=128)
    write_tokenizer(folder)
    weights: Any = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {SHARDS[0]: names[:9], SHARDS[1]: names[9:]}
    for shard, part in parts.items():
        mx.save_safetensors(str(folder / shard), {name: weights[name] for name in part})
    index = {name: shard for shard, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return folder


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint larger than two pieces of a download."""
    return make_checkpoint(tmp_path_factory.mktemp("hub") / "big", hidden=256, neurons=2048, layers=4)


def run_here(
    program: str, server: Hub, home: Path, *arguments: object, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command in this process, because the imports of a new process take most of its time.

    huggingface_hub reads its settings again. Tests that need processes of their own show that it also finds them there:
    where two download at once, one is killed, or one converts an earlier download.
    """
    output, errors = io.StringIO(), io.StringIO()
    handler, sleep = signal.getsignal(signal.SIGTERM), time.sleep
    try:
        with (
            patch.dict(os.environ, server.environment(home) | environment, clear=True),
            patch.object(sys, "argv", ["command", *map(str, arguments)]),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
            pytest.raises(SystemExit) as ended,
        ):
            importlib.reload(constants)
            exec(program, {"__name__": "command"})
    finally:
        signal.signal(signal.SIGTERM, handler)
        time.sleep = sleep
        importlib.reload(constants)
    assert isinstance(ended.value.code, int)
    done = subprocess.CompletedProcess(program, ended.value.code, output.getvalue(), errors.getvalue())
    assert "Traceback" not in done.stderr, done.stderr
    return done


def find(server: Hub, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_here(FIND, server, home, *arguments, **environment)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- from an id to text ----------------------------------------------------------------------------------------


def test_a_repository_is_converted_and_runs_also_offline(
    server: Hub, home: Path, checkpoint: Path, tmp_path: Path
) -> None:
    server.add(REPOSITORY, checkpoint, "v1", **CLUTTER)
    server.add(REPOSITORY, checkpoint, "main", **{SHARDS[0]: b"of a later version"})
    command = ["--model", REPOSITORY, "--revision", "v1"]
    output = tmp_path / "store"
    done = run_here(CONVERT, server, home, *command, "--output", output, "--calibration-tokens", 64)
    assert done.returncode == 0, done.stderr
    convert(checkpoint, tmp_path / "local", Settings(calibration_tokens=64))
    assert contents(output) == contents(tmp_path / "local")
    fetched = server.fetched()
    assert set(fetched) == {path.name for path in checkpoint.iterdir()}
    assert all(spans == [None] for spans in fetched.values()), fetched

    server.requests.clear()
    command += ["--prompt", "Hello", "--max-tokens", "3", "--json"]
    done = server.run(home, "-m", "mlx_flash.generate", *command, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["generation_tokens"] > 0
    assert server.requests == []
    stores = [entry.name for entry in entries(home / "stores") if entry.kind == "store"]
    assert len(stores) == 1 and stores[0].startswith("owner--tiny-")


def test_a_revision_may_be_a_branch_a_tag_or_a_commit(server: Hub, home: Path, checkpoint: Path) -> None:
    for revision in ("main", "v1"):
        server.add(REPOSITORY, checkpoint, revision, **{"chat_template.jinja": revision.encode()})
    for arguments, expected in (
        ((), "main"),
        (("--revision", "v1"), "v1"),
        (("--revision", server.commit(REPOSITORY, "v1")), "v1"),
    ):
        done = find(server, home, REPOSITORY, *arguments)
        assert done.returncode == 0, done.stderr
        folder = Path(done.stdout.strip())
        assert (folder / "chat_template.jinja").read_text() == expected
        assert folder.name == server.commit(REPOSITORY, expected)


def test_a_repository_that_holds_a_store(server: Hub, home: Path, store: Path) -> None:
    server.add(REPOSITORY, store, **CLUTTER)
    done = find(server, home, REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert contents(Path(done.stdout.strip())) == contents(store)


# -- files to fetch --------------------------------------------------------------------------------------------


def index_of(*shards: str) -> str:
    return json.dumps({"weight_map": {f"tensor.{i}": shard for i, shard in enumerate(shards)}})


@pytest.mark.parametrize(
    ("present", "index", "expected"),
    [
        (["model.safetensors", "pytorch_model.bin"], None, ["model.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors", "consolidated.safetensors"], None, ["model.safetensors"]),
        ([*SHARDS, "pytorch_model.bin"], None, [*SHARDS]),
        ([*SHARDS, "consolidated.safetensors", "model.safetensors.index.json"], SHARDS, [*SHARDS]),
        (["a.safetensors", "model-x.safetensors", "model.safetensors.index.json"], ["a.safetensors"],
         ["a.safetensors"]),
        (["pytorch_model.bin", "training_args.bin", "adapter_model.safetensors"], None, ["pytorch_model.bin"]),
        (["pytorch_model-1.bin", "pytorch_model-2.bin", "pytorch_model.bin.index.json"], ["pytorch_model-1.bin"],
         ["pytorch_model-1.bin"]),
        (["weights.safetensors", "original/model.safetensors"], None, ["weights.safetensors"]),
    ],
)  # fmt: skip
def test_one_format_of_the_weights(present: list[str], index: list[str] | None, expected: list[str]) -> None:
    weights = weight_files(present, lambda _: index_of(*index or []), "here")
    assert weights.names == expected and (weights.index is None) == (index is None)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"README.md": b"", "model.safetensors": b"x"}, r"holds neither a store .* nor a checkpoint .*json\)\.$"),
        ({"tiny.gguf": b"x"}, "GGUF files cannot be read"),
        ({"config.json": b"{}", "tiny.gguf": b"x", "model.pth": b"x"}, "has no weights: expected model.*GGUF"),
        ({"config.json": b"{}", "model.safetensors.index.json": index_of(*SHARDS).encode(), SHARDS[0]: b"x"},
         f"lacks 1 of 2 shards, the first is {SHARDS[1]}"),
        ({"config.json": b"{}", "model.safetensors.index.json": b"[]"}, "is not an index of shards"),
    ],
)  # fmt: skip
def test_nothing_is_downloaded_of_what_is_no_checkpoint(
    server: Hub, home: Path, tmp_path: Path, files: dict[str, bytes], words: str
) -> None:
    server.add(REPOSITORY, tmp_path / "nothing", **files)
    done = find(server, home, REPOSITORY)
    assert done.returncode == 1
    with pytest.raises(CheckpointError, match=words):
        hub_listing.wanted_files(files, lambda name: files[name].decode(), REPOSITORY)
    assert set(server.fetched()) <= {"model.safetensors.index.json"}


# -- interrupted -----------------------------------------------------------------------------------------------


def test_a_cut_connection_is_taken_up_by_the_next_run(server: Hub, home: Path, big: Path) -> None:
    server.add(REPOSITORY, big)
    server.cut_at["model.safetensors"] = PIECE + PIECE // 2
    done = find(server, home, REPOSITORY)
    assert done.returncode == 1 and "Run the same command again to continue" in done.stderr
    assert server.fetched()["model.safetensors"][0] is None

    server.cut_at.clear()
    server.requests.clear()
    done = find(server, home, REPOSITORY)
    assert done.returncode == 0 and "resuming after" in done.stderr, done.stderr
    assert contents(Path(done.stdout.strip())) == contents(big)
    (span,) = server.fetched()["model.safetensors"]
    assert span is not None and int(span.removeprefix("bytes=").removesuffix("-")) >= PIECE


def test_a_killed_download_is_taken_up(server: Hub, home: Path, big: Path) -> None:
    server.add(REPOSITORY, big)
    server.stall_at["model.safetensors"] = PIECE + PIECE // 2
    with subprocess.Popen(
        [sys.executable, "-c", FIND, REPOSITORY], env=server.environment(home), stderr=subprocess.DEVNULL
    ) as child:
        assert server.stalled.wait(600)
        (partial,) = wait_for(lambda: [p for p in home.rglob("*.incomplete") if p.stat().st_size >= PIECE])
        child.send_signal(signal.SIGKILL)
    assert partial.stat().st_size == PIECE

    server.stall_at.clear()
    server.requests.clear()
    done = find(server, home, REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert server.fetched()["model.safetensors"] == [f"bytes={PIECE}-"]
    assert contents(Path(done.stdout.strip())) == contents(big)
    assert not list(home.rglob("*.incomplete"))


def wait_for(look: Callable[[], list[Path]], seconds: float = 600) -> list[Path]:
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("size", [PIECE, 100 * PIECE])
def test_a_partial_file_of_other_bytes_is_found_out(server: Hub, home: Path, big: Path, size: int) -> None:
    """A power cut leaves such a file."""
    server.add(REPOSITORY, big)
    server.cut_at["model.safetensors"] = 0
    find(server, home, REPOSITORY)
    (partial,) = home.rglob("*.incomplete")
    os.truncate(partial, size)  # the rest is zeros
    server.cut_at.clear()
    done = find(server, home, REPOSITORY)
    if size == PIECE:
        assert done.returncode == 1 and "model.safetensors of owner/tiny arrived damaged" in done.stderr
        done = find(server, home, REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert contents(Path(done.stdout.strip())) == contents(big)


def test_two_processes_download_once(server: Hub, home: Path, big: Path) -> None:
    server.add(REPOSITORY, big)
    command = [sys.executable, "-c", FIND, REPOSITORY]
    pipe = subprocess.PIPE
    children = [
        subprocess.Popen(command, env=server.environment(home), stdout=pipe, stderr=pipe, text=True) for _ in range(2)
    ]
    outputs = [child.communicate(timeout=600) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert len({output for output, _ in outputs}) == 1
    assert server.fetched()["model.safetensors"] == [None]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_disk(server: Hub, home: Path, big: Path) -> None:
    server.add(REPOSITORY, big)
    server.cut_at["model.safetensors"] = 0
    find(server, home, REPOSITORY)
    server.cut_at.clear()
    (partial,) = home.rglob("*.incomplete")
    partial.unlink()
    partial.symlink_to("/dev/full")
    done = find(server, home, REPOSITORY)
    assert done.returncode == 1 and "is full; the files downloaded so far are kept. Make room" in done.stderr, (
        done.stderr
    )
    partial.unlink()
    assert find(server, home, REPOSITORY).returncode == 0


def test_too_little_room_is_seen_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * 10**9))
    hub_listing.check_free_space(REPOSITORY, {"model.safetensors": 2 * 10**9})
    hub_listing.check_free_space(REPOSITORY, {})
    with pytest.raises(NoSpaceError, match=r"needs 3\.00 GB more in .*, where 3\.00 GB are free.*HF_HOME"):
        hub_listing.check_free_space(REPOSITORY, {"model.safetensors": 3 * 10**9})
    (tmp_path / "models--owner--tiny" / "blobs").mkdir(parents=True)
    with (tmp_path / "models--owner--tiny" / "blobs" / "x.incomplete").open("wb") as file:
        file.truncate(10**9)
    hub_listing.check_free_space(REPOSITORY, {"model.safetensors": 3 * 10**9})  # a third of it is present


# -- refused, and out of reach -----------------------------------------------------------------------------------


def test_what_the_hub_refuses(server: Hub, home: Path, checkpoint: Path) -> None:
    server.add(REPOSITORY, checkpoint)
    server.add("owner/gated", checkpoint)
    server.gated.add("owner/gated")
    for arguments, words in (
        (
            ["owner/gated"],
            f"is gated. Accept its terms at {server.address}/owner/gated, then run `hf auth login`, or set HF_TOKEN",
        ),
        (["owner/nothing"], "owner/nothing is neither a folder nor a Hugging Face repository."),
        ([REPOSITORY, "--revision", "v9"], "owner/tiny has no revision v9; expected the name of a branch"),
    ):
        done = find(server, home, *arguments)
        assert done.returncode == 2 and words in done.stderr, done.stderr


def test_without_the_hub(server: Hub, home: Path, checkpoint: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:1"}
    done = find(server, home, REPOSITORY, **nowhere)
    assert done.returncode == 1 and "was not downloaded before, and the Hub cannot be reached" in done.stderr
    done = find(server, home, REPOSITORY, HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "HF_HUB_OFFLINE is set. Unset it" in done.stderr, done.stderr

    server.add(REPOSITORY, checkpoint, **CLUTTER)
    online = find(server, home, REPOSITORY)
    server.broken = True
    for environment, note in (
        (nowhere, "using the copy of owner/tiny that was downloaded before"),
        ({"HF_HUB_OFFLINE": "1"}, ""),
        ({}, "500"),
    ):
        done = find(server, home, REPOSITORY, **environment)
        assert done.returncode == 0 and done.stdout == online.stdout and note in done.stderr, done.stderr
    commit = server.commit(REPOSITORY, "main")
    assert find(server, home, REPOSITORY, "--revision", commit, HF_HUB_OFFLINE="1").stdout == online.stdout
    done = find(server, home, REPOSITORY, "--revision", "v1", **nowhere)
    assert done.returncode == 1 and "owner/tiny at v1 is not a local folder and was not downloaded" in done.stderr

    for name in (SHARDS[1], "model.safetensors.index.json"):
        (Path(online.stdout.strip()) / name).unlink()
        done = find(server, home, REPOSITORY, HF_HUB_OFFLINE="1")
        assert done.returncode == 1 and f"was downloaded only in part (missing: {name})" in done.stderr, done.stderr


# -- predictors --------------------------------------------------------------------------------------------------


def test_predictors_are_downloaded_in_the_same_way(server: Hub, home: Path, tmp_path: Path) -> None:
    predictors = {"model_0.pt": b"0" * (2 * PIECE), "model_1.pt": b"1"}
    server.add(REPOSITORY, tmp_path / "nothing", **predictors, **{"config.json": b"{}", "README.md": b"#"})
    server.cut_at["model_0.pt"] = PIECE + PIECE // 2
    done = find(server, home, REPOSITORY, "--predictors")
    assert done.returncode == 1 and "Run the same command again to continue" in done.stderr, done.stderr

    server.cut_at.clear()
    server.requests.clear()
    done = find(server, home, REPOSITORY, "--predictors")
    assert done.returncode == 0 and "model_0.pt: resuming after" in done.stderr, done.stderr
    assert contents(Path(done.stdout.strip())) == predictors
    fetched = server.fetched()
    assert set(fetched) == set(predictors) and fetched["model_0.pt"] == [f"bytes={PIECE}-"]

    offline = find(server, home, REPOSITORY, "--predictors", HF_HUB_OFFLINE="1")
    assert offline.stdout == done.stdout
    (Path(done.stdout.strip()) / "model_1.pt").unlink()
    done = find(server, home, REPOSITORY, "--predictors", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "was downloaded only in part (missing: model_1.pt)" in done.stderr, done.stderr


def test_predictors_that_cannot_be_had(server: Hub, home: Path, checkpoint: Path) -> None:
    server.add(REPOSITORY, checkpoint)
    for repository, code, words in (
        (REPOSITORY, 1, "owner/tiny holds no predictors: expected model_0.pt, model_1.pt and so on."),
        ("owner/nothing", 2, "owner/nothing is neither a folder nor a Hugging Face repository."),
    ):
        done = find(server, home, repository, "--predictors")
        assert done.returncode == code and words in done.stderr, done.stderr
    assert server.fetched() == {}


def hub_error(kind: type[Exception]) -> Exception:
    """An error without the HTTP response that some of these kinds require."""
    error = kind.__new__(kind)
    error.args = ("from the hub",)
    return error


@pytest.mark.parametrize(
    ("raised", "expected", "message"),
    [
        (hub_error(hub_errors.HFValidationError), UsageError, "neither a folder nor a Hugging Face repository id"),
        (hub_error(hub_errors.HfHubHTTPError), ConversionError, "downloading some/model failed.*same command again"),
        (OSError(28, "No space left on device"), NoSpaceError, "is full.*Make room"),
        (RuntimeError("some HTTP\nlibrary's own"), ConversionError, "failed: some HTTP library's own. Run"),
        (TimeoutError(), ConversionError, "failed: TimeoutError. Run"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_else_may_happen(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[FlashError], message: str
) -> None:
    def download(*_: Any) -> Path:
        raise raised

    monkeypatch.setattr(hub, "_download", download)
    with pytest.raises(expected, match=message) as caught:
        hub.download("some/model")
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_a_small_file_that_is_not_small_is_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"config.json": 600, "model.safetensors": 10**9, "big.json": 64 << 30}
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(sha="0", siblings=siblings)
    )
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(
        CheckpointError, match=r"big.json of owner/tiny has 68719 MB; a file of its kind has at most 64"
    ):
        hub.download(REPOSITORY)


def test_templates_with_names_of_their_own_are_downloaded() -> None:
    """These templates are in the only subfolder that transformers reads."""
    folder = "additional_chat_templates"
    names = ["config.json", "model.safetensors", "a/b.jinja", f"{folder}/._tool_use.jinja", f"{folder}/a/b.jinja"]
    wanted = hub_listing.wanted_files([*names, f"{folder}/tool_use.jinja"], lambda _: "", REPOSITORY)
    assert wanted == ["config.json", f"{folder}/tool_use.jinja", "model.safetensors"]


def test_hidden_files_are_not_downloaded() -> None:
    names = ["config.json", "._config.json", "model.safetensors", "._model.safetensors", ".cache.json"]
    assert hub_listing.wanted_files(names, lambda _: "", REPOSITORY) == ["config.json", "model.safetensors"]
