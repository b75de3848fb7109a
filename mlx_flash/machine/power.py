"""Battery, Low Power Mode and heat: whether the machine may run at its speed. It runs in a process of its own, because
it calls Apple's Foundation through the Objective-C runtime."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from .told import Facts, from_child, part, told

HEAT = ("nominal", "fair", "serious", "critical")  # NSProcessInfoThermalState
PROFILE = Path("/sys/firmware/acpi/platform_profile")  # of Linux
_OBJC = "/usr/lib/libobjc.A.dylib"
_FOUNDATION = "/System/Library/Frameworks/Foundation.framework/Foundation"


def power() -> Facts:
    """battery_percent (None without a battery), plugged_in (None if that is not known), low_power: whether the system
    saves power, heat (macOS): "nominal", "fair", "serious" or "critical"."""
    return from_child("power")


def asked_here() -> Facts:
    """`power`, asked by this process."""
    asked: dict[str, Callable[[], object]] = {
        "battery_percent": lambda: None if (b := _battery()) is None else round(b.percent),
        "plugged_in": lambda: None if (b := _battery()) is None else b.power_plugged,
        "low_power": _low_power,
    }
    if sys.platform == "darwin":
        asked["heat"] = lambda: HEAT[_of_process_info("thermalState", ctypes.c_long)]
    return told(asked)


def _battery() -> Any:
    return psutil.sensors_battery()


def _low_power() -> bool:
    if sys.platform == "darwin":
        return bool(_of_process_info("isLowPowerModeEnabled", ctypes.c_bool))
    if not PROFILE.exists():
        raise OSError("this system has no power profiles")
    return PROFILE.read_text().strip() == "low-power"


def _of_process_info(name: str, kind: type[ctypes.c_bool] | type[ctypes.c_long]) -> int:
    """[[NSProcessInfo processInfo] name], of the kind `kind`."""
    ctypes.CDLL(_FOUNDATION)
    objc = ctypes.CDLL(_OBJC)
    objc.objc_getClass.restype = objc.sel_registerName.restype = ctypes.c_void_p
    objc.objc_getClass.argtypes = objc.sel_registerName.argtypes = (ctypes.c_char_p,)

    def send(receiver: int, selector: str, kind: type) -> int:
        # On arm64 a call must have the types of the method; that of objc_msgSend itself says nothing of them.
        call = ctypes.CFUNCTYPE(kind, ctypes.c_void_p, ctypes.c_void_p)(("objc_msgSend", objc))
        return int(call(receiver, objc.sel_registerName(selector.encode())) or 0)

    info = send(objc.objc_getClass(b"NSProcessInfo"), "processInfo", ctypes.c_void_p)
    return send(info, name, kind)


if __name__ == "__main__":
    print(json.dumps(part(asked_here)))
