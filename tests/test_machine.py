"""What is told of a machine: of this one, of one that answers like a Mac, and of one that tells nothing."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import plistlib
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_flash.errors import FlashError
from mlx_flash.flash import dataless, sysctl
from mlx_flash.machine import (
    disk_probe,
    environment,
    gathered,
    hardware,
    memory_state,
    power,
    told,
    volumes,
)
from mlx_flash.machine.cache_contents import STALE_DAYS, cache_contents
from mlx_flash.machine.device import device, self_tests
from mlx_flash.source import mounts as mounts_module
from mlx_flash.source.cached import MATRICES, PROBE, entries, remove
from mlx_flash.source.ssd_writes import PROBES, written_bytes


def fails() -> Any:
    raise OSError(5, "Input/output error")


def test_a_fact_that_cannot_be_asked_is_none_with_a_reason() -> None:
    facts = told.told({"one": lambda: 1, "two": fails})
    assert facts == {"one": 1, "two": None, "unknown": {"two": "Input/output error"}}
    assert told.part(fails) == {"unknown": {told.EVERYTHING: "Input/output error"}}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.abort()", "its process ended by SIGABRT"),
        ("import sys; sys.exit('no such\\nlibrary')", "its process ended with code 1: library"),
        ("print('words')", "its process ended with code 0"),
        ("print([])", "its process answered something else"),
        ("import time; time.sleep(60)", "no answer within 1 seconds"),
    ],
)
def test_a_part_whose_process_dies_says_how(code: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **more: run([sys.executable, "-c", code], **more))
    assert told.from_child("device", seconds=1) == told.nothing(reason)


def test_this_machine() -> None:
    facts = hardware.hardware()
    assert facts["memory_bytes"] > 1 << 28 and facts["cores"] >= 1 and facts["system"] in ("macOS", "Linux")
    assert hardware.versions()["packages"]["mlx-flash-runtime"] and hardware.versions()["unknown"] == {}
    memory = memory_state.memory_state()
    assert 0 < memory["free_bytes"] <= memory["total_bytes"]
    assert environment.environment()["unmet"] == []
    assert {name: value for name, value in device().items() if name == "kind"}.keys() == {"kind"}
    json.dumps([facts, memory])


@pytest.mark.parametrize(("told", "kept"), [(2**63 - 4096, None), (None, None), (1 << 20, 1 << 20)])
def test_a_limit_above_the_memory_is_not_a_limit(
    told: int | None, kept: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("mlx_flash.flash.system.cgroup_free_bytes", lambda *_: told)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "")
    assert memory_state._limit_free_bytes() == kept


def test_the_self_tests_pass_here() -> None:
    tests = dict.fromkeys(["shared_memory", "reader", "packed_products", "products"], True)
    assert self_tests() == {**tests, "unknown": {}}


SYSCTLS = {
    "kern.osproductversion": b"26.1\0",
    "hw.optional.arm64": struct.pack("<i", 1),
    "machdep.cpu.brand_string": b"Apple M4\0",
    "hw.physicalcpu": struct.pack("<i", 10),
    "hw.perflevel0.physicalcpu": struct.pack("<i", 4),
    "hw.perflevel1.physicalcpu": struct.pack("<i", 6),
    "hw.memsize": struct.pack("<q", 16 << 30),
    "hw.model": b"Mac16,12\0",
    "kern.hv_vmm_present": struct.pack("<i", 0),
    "kern.memorystatus_vm_pressure_level": struct.pack("<i", 2),
    "sysctl.proc_translated": struct.pack("<i", 1),
    "vm.swapusage": struct.pack("<QQQII", 3 << 30, 1 << 30, 2 << 30, 16384, 1),
}


class Kernel:
    """sysctlbyname(3) of a Mac with 16 GB."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    @staticmethod
    def sysctlbyname(name: bytes, room: Any, size: Any, _new: object, _length: object) -> int:
        if (value := SYSCTLS.get(name.decode())) is None:
            return -1
        if room is not None:
            ctypes.memmove(room, value, len(value))
        size._obj.value = len(value)
        return 0


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysctl.ctypes, "CDLL", lambda *_, **__: Kernel())
    for module in (hardware, memory_state, volumes):
        monkeypatch.setattr(module.sys, "platform", "darwin")


@pytest.mark.usefixtures("mac")
def test_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = json.dumps({"SPDisplaysDataType": [{"sppci_cores": "10"}]}).encode()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=profile))
    facts = hardware.hardware()
    assert facts.pop("kernel")
    assert facts == {
        "system": "macOS",
        "system_version": "26.1",
        "architecture": "arm64",
        "chip": "Apple M4",
        "cores": 10,
        "memory_bytes": 16 << 30,
        "virtual": False,
        "model": "Mac16,12",
        "performance_cores": 4,
        "efficiency_cores": 6,
        "gpu_cores": 10,
        "unknown": {},
    }
    assert hardware.versions()["translated"] is True
    memory = memory_state.memory_state()
    assert (memory["pressure"], memory["swap_used_bytes"]) == ("warning", 2 << 30)


@pytest.mark.usefixtures("mac")
def test_a_mac_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: fails())
    monkeypatch.delitem(SYSCTLS, "hw.perflevel1.physicalcpu")
    facts = hardware.hardware()
    assert facts["efficiency_cores"] is None and facts["gpu_cores"] is None
    assert facts["unknown"] == {
        "efficiency_cores": "the kernel does not tell hw.perflevel1.physicalcpu",
        "gpu_cores": "Input/output error",
    }


def test_another_system_has_no_sysctl() -> None:
    if sys.platform != "darwin":
        with pytest.raises(OSError, match=r"no sysctl|does not tell"):
            sysctl.sysctl_text("kern.osproductversion")


def test_pressure_on_linux() -> None:
    text = "some avg10=12.50 avg60=0.00 avg300=0.00 total=5\nfull avg10=1.00 avg60=0.00 avg300=0.00 total=4\n"
    assert memory_state.pressure_share(text) == 0.125
    with pytest.raises(ValueError, match="no line"):
        memory_state.pressure_share("")


def test_power_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"battery_percent", "plugged_in", "low_power", "unknown"} <= power.power().keys()
    monkeypatch.setattr(power.psutil, "sensors_battery", lambda: SimpleNamespace(percent=41.6, power_plugged=False))
    facts = power.asked_here()
    assert (facts["battery_percent"], facts["plugged_in"]) == (42, False)


def partitions(monkeypatch: pytest.MonkeyPatch, *mounts: tuple[str, str, str]) -> None:
    found = [SimpleNamespace(device=device, mountpoint=mount, fstype=kind) for device, mount, kind in mounts]
    monkeypatch.setattr(mounts_module.psutil, "disk_partitions", lambda all: found)


def test_the_volume_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = volumes.volume(tmp_path / "not" / "there")
    assert 0 < facts["free_bytes"] <= facts["total_bytes"] and facts["network"] is False
    partitions(monkeypatch, ("/dev/one", "/", "ext4"), ("//server/x", str(tmp_path), "cifs"))
    facts = volumes.volume(tmp_path)
    assert (facts["file_system"], facts["network"]) == ("cifs", True)
    partitions(monkeypatch, ("a", str(tmp_path), "nfs4"), ("b", str(tmp_path), "ext4"))
    assert volumes.volume(tmp_path)["file_system"] == "ext4"
    partitions(monkeypatch)
    assert volumes.volume(tmp_path)["unknown"].keys() >= {"file_system", "network"}


@pytest.mark.usefixtures("mac")
def test_the_volume_of_a_folder_on_a_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partitions(monkeypatch, ("/dev/disk4s2", str(tmp_path), "apfs"))
    asked: list[str] = []
    told_by_it = plistlib.dumps({"Internal": False, "SolidState": True, "BusProtocol": "USB"})

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        asked.append(command[-1])
        return SimpleNamespace(stdout=told_by_it)

    monkeypatch.setattr(subprocess, "run", run)
    facts = volumes.volume(tmp_path)
    assert set(asked) == {"/dev/disk4s2"}
    assert (facts["external"], facts["spinning"], facts["connection"]) == (True, False, "USB")
    assert volumes.in_cloud(Path("/Users/x/Library/Mobile Documents/com~apple~CloudDocs"))


def test_files_that_are_only_in_the_cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "there"):
        (tmp_path / name).touch()
    stat = Path.stat

    def flagged(path: Path, **more: Any) -> Any:
        state = stat(path, **more)
        flags = dataless._SF_DATALESS if path.name == "there" else 0
        return SimpleNamespace(st_mode=state.st_mode, st_flags=flags, st_dev=state.st_dev)

    monkeypatch.setattr(Path, "stat", flagged)
    assert volumes.volume(tmp_path)["dataless_files"] == 1


def test_the_disk_is_measured_with_a_file_that_goes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_probe, "OWN_BYTES", 48 << 20)
    monkeypatch.setattr(disk_probe, "SPARE_BYTES", 0)
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "record"))
    facts = disk_probe.probe(None, tmp_path / "cache", seconds=0.01)
    assert [(rate["at_once"], rate["piece_bytes"]) for rate in facts["rates"]] == [
        (number, size) for number in disk_probe.AT_ONCE for size in disk_probe.SIZES
    ]
    assert all(rate["bytes_per_second"] > 0 and rate["reads"] > 0 for rate in facts["rates"])
    assert facts["written_bytes"] == facts["file_bytes"] == 48 << 20
    assert written_bytes()["today"] == {PROBES: 48 << 20}
    assert list((tmp_path / "cache").iterdir()) == []
    json.dumps(facts)


def test_a_small_file_is_measured_with_the_pieces_that_it_has(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(200 << 10))
    facts = disk_probe.probe(tmp_path / "file", tmp_path, seconds=0.001)
    assert {rate["piece_bytes"] for rate in facts["rates"]} == {16 << 10, 128 << 10}
    assert facts["written_bytes"] == 0
    (tmp_path / "empty").touch()
    assert disk_probe.probe(tmp_path / "empty", tmp_path)["rates"] == []


def test_pieces_in_the_page_cache_are_left_out() -> None:
    pages = np.ones((64 << 20) // mmap.PAGESIZE, bool)
    pages[len(pages) // 2 :] = False
    offsets = disk_probe._pieces(16 << 10, 64 << 20, pages)
    assert offsets.min() >= 32 << 20 and len(offsets) == (32 << 20) // (32 << 10)
    assert len(disk_probe._pieces(16 << 10, 64 << 20, np.ones_like(pages))) == (64 << 20) // (32 << 10)


def test_too_little_room_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_probe, "SPARE_BYTES", 1 << 60)
    with pytest.raises(FlashError, match="free, too little"):
        disk_probe.probe(None, tmp_path)


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    assert (cache_contents()["total_bytes"], cache_contents()["entries"]) == (0, [])
    left, matrices = tmp_path / "cache" / f"{PROBE}x", tmp_path / "cache" / f"{MATRICES}y"
    matrices.mkdir(parents=True)
    left.write_bytes(bytes(1 << 20))
    assert cache_contents()["stale_bytes"] == 0
    long_ago = time.time() - (STALE_DAYS + 1) * 86400
    os.utime(left, (long_ago, long_ago))
    facts = cache_contents()
    assert facts["stale_bytes"] >= 1 << 20 and facts["conversations"] == 0
    assert facts["written"]["today"] == {} and facts["unknown"] == {}
    assert {entry["kind"] for entry in facts["entries"]} == {"remains of a disk probe", "benchmark's matrices"}
    for entry in entries(tmp_path / "cache"):
        assert remove(entry)
    assert cache_contents()["entries"] == []


def test_preloaded_libraries_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/one.so:/usr/lib/two.so three.so")
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "4")
    monkeypatch.setenv("MLX_FLASH_CACHE", "/nowhere")
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setattr(environment, "requires", lambda _: ["mlx>=9", "none-such", "numpy", 'toga; extra == "app"'])
    facts = environment.environment()
    assert facts["preloaded"] == ["one.so", "two.so", "three.so"]
    assert facts["mlx_variables"] == ["MLX_MAX_OPS_PER_BUFFER"] and facts["temporary_folder"] is False
    assert [(unmet["package"], unmet["wanted"]) for unmet in facts["unmet"]] == [("mlx", ">=9"), ("none-such", "")]
    assert facts["unmet"][1]["found"] is None


def test_the_largest_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("small", 10), ("large", 100)):
        (tmp_path / name).write_bytes(bytes(size))
    assert gathered.largest_file(tmp_path) is None
    monkeypatch.setattr(gathered, "LEAST_BYTES", 50)
    assert gathered.largest_file(tmp_path) == tmp_path / "large"


def test_a_machine_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [
        *("hardware", "versions", "environment", "memory_state", "power"),
        *("device", "self_tests", "volume", "probe", "cache_contents", "kept_trials"),
    ]
    for name in parts:
        monkeypatch.setattr(gathered, name, lambda *_: fails())
    said: list[str] = []
    facts = gathered.gathered(say=said.append)
    assert said == [name for name in facts if name != "findings"]
    assert all(facts[name] == told.part(fails) for name in said)
    assert [finding["name"] for finding in facts["findings"]] == ["mlx_fails"]
