"""The addresses of NumPy arrays, for calls of C functions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

address: Callable[[np.ndarray], Any] = (ctypes.c_char * 0).from_buffer  # type: ignore[assignment]
"""The memory of a writable, contiguous array, as an argument that is a pointer. It keeps the array alive, and takes a
quarter of the time of `array.ctypes.data`. Raises TypeError or BufferError for other arrays."""
