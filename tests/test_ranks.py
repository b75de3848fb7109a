"""The group of ranks: its two forms, the control channel, the host file, and what happens when a rank ends."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ranks_program  # type: ignore[import-not-found]  # found beside this file
from processes import has_ended  # type: ignore[import-not-found]  # found beside this file
from ranks_double import ranks_as_threads  # type: ignore[import-not-found]  # found beside this file

from mlx_flash.errors import FlashError, UsageError
from mlx_flash.ranks import messages, secret
from mlx_flash.ranks.hosts import RankHost, local_hosts, read_hosts
from mlx_flash.ranks.leader import Leader
from mlx_flash.ranks.starting import rank_command
from mlx_flash.ranks.versions import check_versions, versions
from mlx_flash.source.children import child_environment


def start(ranks: int, what: str, **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **more, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, ranks_program.__file__, str(ranks), what]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


def started(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The other ranks, which work only after this."""
    assert process.stdin is not None and process.stdout is not None
    others = [psutil.Process(pid) for pid in json.loads(process.stdout.readline())["pids"]]
    process.stdin.write("\n")
    process.stdin.flush()
    return others


def all_end(processes: list[psutil.Process]) -> bool:
    psutil.wait_procs(processes, timeout=60)
    return all(map(has_ended, processes))


def check_use(found: dict[str, Any], size: int) -> None:
    said = [
        "its disk is broken",
        "'unknown', is not known here",
        *["where [1, 4] (any) is expected", "where [2] (any) is expected", "where [2, any, 1] (any) is expected"],
        "returns [2, 4] (mlx.core.float32) where [2, any] (mlx.core.float16) is expected",
        "it has another model",
        "complex64, which is not sent",
    ]
    for sentence, part in zip(found.pop("said"), said, strict=True):
        assert part in sentence
    assert found == ranks_program.expected(size)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_as_processes(size: int) -> None:
    process = start(size, "use")
    others = started(process)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    check_use(json.loads(printed), size)
    assert all_end(others)


def test_ctrl_c_at_any_moment_spoils_nothing() -> None:
    process = start(3, "interrupted")
    others = started(process)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    came, found = printed.splitlines()
    assert int(came) >= 300
    check_use({**json.loads(found), "read": ranks_program.expected(3)["read"]}, 3)
    assert all_end(others)


def test_connections_of_others_do_not_stop_a_start(tmp_path: Path) -> None:
    process = start(3, "flooded", **{ranks_program.AFTER: str(tmp_path / "flooded")})
    others = started(process)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    check_use(json.loads(printed), 3)
    assert all_end(others)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_as_threads(size: int) -> None:
    with ranks_as_threads(size, ranks_program.register) as group:
        if size > 1:
            check_use(ranks_program.use(group), size)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_ends_or_hangs_ends_all(number: signal.Signals) -> None:
    process = start(3, "stuck")
    others = started(process)
    others[1].send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.count("rank 2 (127.0.0.1)") == 1, errors
    assert errors.endswith("the generation ends on all machines.\n")
    assert all_end(others)


def test_a_rank_whose_main_thread_hangs_ends_all() -> None:
    process = start(2, "hang")
    others = started(process)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "rank 1 (127.0.0.1) has not finished a call for 1 s, so" in errors.splitlines()[-1]
    assert all_end(others)


@pytest.mark.parametrize("seed", range(3))
def test_random_faults_of_working_ranks(seed: int) -> None:
    source = random.Random(seed)
    process = start(3, "steps")
    others = started(process)
    time.sleep(source.random() / 2)
    rank = source.randrange(1, 3)
    others[rank - 1].send_signal(source.choice([signal.SIGKILL, signal.SIGTERM]))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.count(f"rank {rank} (127.0.0.1)") == 1 and errors.endswith("ends on all machines.\n"), errors
    assert all_end(others)


@pytest.mark.parametrize("sends", [True, False])
def test_a_closed_connection_waits_for_its_reason(sends: bool) -> None:
    """Another thread finds it out, and the sentence is that thread's."""

    class Closed:
        def send(self, header: dict[str, Any], data: bytes) -> None:
            if sends:
                raise BrokenPipeError

        def take(self) -> messages.Message:
            raise EOFError

    leader: Any = Leader.__new__(Leader)
    leader.size, leader.fault, leader._hosts, leader._channels = 2, None, local_hosts(2), {1: Closed()}
    leader._sent, leader._told = 0, threading.Event()

    def lost() -> None:
        leader.fault = "rank 1 was ended by SIGKILL"
        leader._told.set()

    timer = threading.Timer(0.1, lost)
    timer.start()
    with pytest.raises(FlashError, match="SIGKILL"):
        leader.ask({"echo": None})
    timer.join()


def test_the_others_end_with_rank_0() -> None:
    process = start(3, "idle")
    others = started(process)
    process.kill()
    process.communicate()
    assert all_end(others)


def test_a_rank_that_cannot_start_is_named() -> None:
    process = start(2, "broken")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "rank 1 (127.0.0.1) ended with code 1: no such module." in errors


def test_addresses_of_other_machines_are_refused() -> None:
    here, elsewhere = local_hosts(2)[0], RankHost("127.0.0.1", "192.0.2.1")
    with pytest.raises(FlashError, match=r"cannot listen on 192\.0\.2\.1: .*first machine"):
        Leader([elsewhere, here], child_environment())
    with pytest.raises(FlashError, match=r"rank 1 .* cannot be reached at 127\.0\.0\.1 from 192\.0\.2\.1: .*host file"):
        Leader([here, elsewhere], child_environment())


# -- the control channel -------------------------------------------------------------------------------------------


def test_messages_arrive_whole() -> None:
    one, other = socket.socketpair()
    with one, other:
        threading.Thread(target=messages.send, args=(one, {"call": "é"}, bytes(3 << 20))).start()
        assert messages.receive(other) == ({"call": "é"}, bytearray(3 << 20))
        one.close()
        with pytest.raises(EOFError):
            messages.receive(other)


@pytest.mark.parametrize(
    "sent",
    [
        messages.LENGTHS.pack(1 << 31, 0),
        messages.LENGTHS.pack(2, 1 << 31) + b"{}",
        messages.LENGTHS.pack(2, 0) + b"[]",
        messages.LENGTHS.pack(2, 0) + b"\xff\xff",
        messages.LENGTHS.pack(60000, 0) + b"[" * 60000,
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_foreign_bytes_are_refused(sent: bytes) -> None:
    one, other = socket.socketpair()
    with one, other:
        one.sendall(sent)
        with pytest.raises(messages.BadMessageError):
            messages.receive(other)


@pytest.mark.parametrize(
    ("theirs", "rank", "admitted"),
    [("right", 1, True), ("right", 2, True), ("wrong", 1, False), ("right", 0, False), ("right", 3, False)],
)
def test_only_who_knows_the_secret_is_admitted(theirs: str, rank: int, admitted: bool) -> None:
    right = secret.new_secret()
    given = right if theirs == "right" else secret.new_secret()
    one, other = socket.socketpair()
    errors: list[Exception] = []

    def connect() -> None:
        try:
            secret.greet(other, given, rank)
        except (OSError, EOFError, FlashError) as error:
            errors.append(error)

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        if admitted:
            assert secret.check(one, right, 3) == rank
        else:
            with pytest.raises(FlashError, match="does not come from a rank"):
                secret.check(one, right, 3)
    finally:
        one.close()
        thread.join()
        other.close()
    assert bool(errors) is not admitted


@pytest.mark.parametrize("proof", ["\ud800", "ü", 1, None])
def test_a_proof_in_another_form_is_refused(proof: object) -> None:
    one, other = socket.socketpair()
    with one, other:
        messages.send(other, {"rank": 1, "nonce": "\ud800", "proof": proof})
        with pytest.raises(FlashError, match="does not come from a rank"):
            secret.check(one, secret.new_secret(), 3)


def test_rank_0_proves_itself_as_well() -> None:
    one, other = socket.socketpair()
    with one, other:
        messages.send(one, {"nonce": "00"})
        messages.send(one, {"proof": "00"})
        with pytest.raises(FlashError, match="does not know the secret"):
            secret.greet(other, secret.new_secret(), 1)


# -- host files and versions ---------------------------------------------------------------------------------------

OPEN_FILE = pytest.mark.filterwarnings("ignore::ResourceWarning")  # MLX leaves the closing to the collector.


@OPEN_FILE
def test_a_host_file(tmp_path: Path) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(
        json.dumps(
            {
                "backend": "ring",
                "envs": ["A=b c"],
                "hosts": [
                    {"ssh": "mac1", "ips": ["10.0.0.1"], "rdma": []},
                    {"ssh": "mac2", "ips": ["10.0.0.2", "10.0.1.2"], "python": "/p y", "memory": "8GB", "model": "/m"},
                ],
            }
        )
    )
    first, second = read_hosts(path)
    assert first == RankHost("mac1", "10.0.0.1", variables=("A=b c",))
    assert second == RankHost("mac2", "10.0.0.2", "/p y", "8GB", "/m", ("A=b c",))
    command = rank_command(second)
    assert command[0] == "ssh" and command[-2] == "mac2"
    assert command[-1] == "env PYTHONSAFEPATH=1 'A=b c' '/p y' -m mlx_flash.rank"


@pytest.mark.parametrize("kind", ["pipe", "folder", "none"])
def test_a_host_file_is_a_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "hosts.json"
    if kind != "none":
        (os.mkfifo if kind == "pipe" else os.mkdir)(path)
    with pytest.raises(UsageError, match="is not a file"):
        read_hosts(path)


@OPEN_FILE
@pytest.mark.parametrize(
    ("hosts", "said"),
    [
        ("not JSON", "Failed to parse"),
        ([{"ssh": "a", "ips": ["10.0.0.1"]}], "names 1 machines"),
        *((each, "no list of machines") for each in ("null", "5", '"x"', '{"hosts": {}}')),
        *(([{"ssh": "a", "ips": [each]}] * 2, "IPv4 address") for each in ("0.0.0.0", "224.0.0.1", "255.255.255.255")),
        ([{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b", "ips": []}], "IPv4 address"),
        ([{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b", "ips": ["mac2.local"]}], "IPv4 address"),
        ([{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "-oProxyCommand=x", "ips": ["10.0.0.2"]}], "name for ssh"),
        ([{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b", "ips": ["10.0.0.2"], "memory": 8}], "as memory"),
        ([{"ssh": "a", "ips": ["10.0.0.1"]}, {"ssh": "b", "ips": ["10.0.0.2"], "memroy": "8GB"}], "'memory' is"),
        ({"envs": None, "hosts": [{"ssh": "a", "ips": ["10.0.0.1"]}] * 2}, "as envs"),
        ({"envs": ["A B"], "hosts": [{"ssh": "a", "ips": ["10.0.0.1"]}] * 2}, "NAME=VALUE"),
    ],
)
def test_host_files_that_are_refused(tmp_path: Path, hosts: Any, said: str) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(hosts if isinstance(hosts, str) else json.dumps(hosts))
    with pytest.raises(UsageError, match=said):
        read_hosts(path)


def test_other_versions_are_refused() -> None:
    check_versions("rank 1 (mac2)", versions())
    with pytest.raises(FlashError, match=r"rank 1 \(mac2\) has mlx 0\.1, and rank 0 has"):
        check_versions("rank 1 (mac2)", {**versions(), "mlx": "0.1"})
