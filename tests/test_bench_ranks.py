"""What the benchmarks of several ranks compute, and the namespaces that they run in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

from mlx_flash.bench import link_table
from mlx_flash.bench.tools import namespaces
from mlx_flash.bench.tools.rank_costs import Link, exchange_seconds, largest_share, ring_seconds


@pytest.mark.parametrize(("experts", "chosen", "ranks"), [(6, 3, 2), (7, 4, 3), (8, 1, 4), (5, 5, 2)])
def test_the_largest_share_is_that_of_all_choices(experts: int, chosen: int, ranks: int) -> None:
    most = [
        max(sum(expert % ranks == rank for expert in choice) for rank in range(ranks))
        for choice in combinations(range(experts), chosen)
    ]
    assert largest_share(experts, chosen, ranks) == pytest.approx(sum(most) / len(most))


def test_a_mean_number_lies_between_its_neighbours() -> None:
    between = (largest_share(8, 2, 2) + largest_share(8, 3, 2)) / 2
    assert largest_share(8, 2.5, 2) == pytest.approx(between)
    assert largest_share(8, 0, 2) == 0


def test_an_exchange_is_two_messages_and_a_ring_has_more() -> None:
    link = Link(message_s=1.0, control_s=5.0, bytes_per_second=10.0)
    assert exchange_seconds(link, 1, 10, 20) == ring_seconds(link, 1, 10, 20) == 0
    assert exchange_seconds(link, 4, 10, 20) == 2 * 5 + 3 * 3
    assert ring_seconds(link, 2, 10, 20) == 5 + 3  # the control message takes longer than x
    assert ring_seconds(link, 4, 10, 20) == 3 * 2 + 3 * 3


def test_one_machine_sends_nothing() -> None:
    row = link_table.row_of("alone", link_table.LINKS["10 GbE, TCP"], link_table.OWN, 1, 3e9)
    assert row["layer_ms"] == row["chunk_s"] == 0
    assert row["reading_ms"] == pytest.approx(48 * 6 * 2.654208e6 / 3e9 * 1e3)


@pytest.fixture(scope="module")
def two() -> Iterator[namespaces.Machines]:
    if (reason := namespaces.usable()) is not None:
        pytest.skip(reason)
    with namespaces.machines(2, delay_s=0.001) as made:
        yield made


def test_ssh_enters_another_machine(two: namespaces.Machines) -> None:
    words = ["sh", "-c", "ssh -T -o BatchMode=yes -- mac2 'ip -brief address show wire0'; exit 3"]
    done = subprocess.run(
        two.command(0, words), env={"PATH": two.environment()["PATH"]}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 3 and two.addresses[1] in done.stdout, done.stderr


def test_a_wire_is_not_faster_than_its_delay(two: namespaces.Machines) -> None:
    """A connection between two machines waits for one packet each way."""
    program = (
        "import socket, time, sys\n"
        "began = time.monotonic()\n"
        "try: socket.create_connection((sys.argv[1], 9), 5)\n"
        "except ConnectionRefusedError: print(time.monotonic() - began)\n"
    )
    words = ["python3", "-c", program, two.addresses[1]]
    done = subprocess.run(two.command(0, words), capture_output=True, text=True, timeout=60)
    assert float(done.stdout) >= 0.002, done.stderr


def test_a_command_runs_on_two_machines(tmp_path: Path) -> None:
    if (reason := namespaces.usable()) is not None:
        pytest.skip(reason)
    hosts = tmp_path / "macs.json"
    command = [sys.executable, "-m", "mlx_flash.bench.tools.two_machines", "--hosts", str(hosts)]
    done = subprocess.run([*command, "--", "sh", "-c", "exit 5"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 5, done.stderr
    assert json.loads(hosts.read_text()) == [
        {"ssh": "mac1", "ips": [namespaces.address(0)]},
        {"ssh": "mac2", "ips": [namespaces.address(1)]},
    ]


def test_no_machine_is_left() -> None:
    if (reason := namespaces.usable()) is not None:
        pytest.skip(reason)
    spaces: list[Path] = []
    with pytest.raises(KeyError), namespaces.machines(1) as made:
        spaces += made.spaces
        assert spaces[0].exists()
        raise KeyError
    assert not spaces[0].exists()
