"""Values of the kernel on macOS, read by sysctlbyname(3). No rights are needed."""

from __future__ import annotations

import ctypes
import struct


def sysctl_bytes(name: str) -> bytes:
    """A value as the kernel gives it. Raises OSError if there is none of this name."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "sysctlbyname", None)
    if call is None:
        raise OSError("this system has no sysctl")
    size = ctypes.c_size_t(0)
    if call(name.encode(), None, ctypes.byref(size), None, ctypes.c_size_t(0)):
        raise OSError(f"the kernel does not tell {name}")
    room = ctypes.create_string_buffer(size.value)
    if call(name.encode(), room, ctypes.byref(size), None, ctypes.c_size_t(0)):
        raise OSError(f"the kernel does not tell {name}")
    return room.raw[: size.value]


def sysctl_text(name: str) -> str:
    """Raises OSError."""
    return sysctl_bytes(name).rstrip(b"\0").decode(errors="replace")


def sysctl_number(name: str) -> int:
    """An integer of 4 or 8 bytes. Raises OSError."""
    return int.from_bytes(sysctl_bytes(name), "little", signed=True)


def swap_usage() -> tuple[int, int]:
    """(bytes of swap in all, bytes in use), from vm.swapusage: sys/sysctl.h, struct xsw_usage. Raises OSError."""
    total, _, used = struct.unpack_from("<QQQ", sysctl_bytes("vm.swapusage"))
    return total, used
