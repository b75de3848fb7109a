"""What the processes that tests start find on their path, and MLX_FLASH_TEST_DEVICE=cpu: the suite computes on the CPU
where MLX would take the GPU, in its processes as well.

To be imported before mlx-lm, which makes a stream on the default device.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import pickle
import tempfile
from pathlib import Path

# OpenBLAS's threads wait for each other at full load: for the small matrices here that is most of what they do.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
if (set_threads := getattr(ctypes.CDLL(None), "openblas_set_num_threads", None)) is not None:
    set_threads(1)  # of one that was loaded before

import mlx.core as mx

FOR_CHILDREN = str(Path(__file__).with_name("in_children"))
ON_CPU = os.environ.get("MLX_FLASH_TEST_DEVICE") == "cpu"
if ON_CPU:
    mx.set_default_device(mx.cpu)


def set_numpy_threads(count: int) -> None:
    """Of the OpenBLAS that NumPy brings, which has read the environment where NumPy was loaded before this file."""
    import numpy as np

    for path in Path(np.__file__).parents[1].glob("numpy.libs/libscipy_openblas*"):
        for name in ("scipy_openblas_set_num_threads64_", "scipy_openblas_set_num_threads"):
            if (set_threads := getattr(ctypes.CDLL(str(path)), name, None)) is not None:
                set_threads(count)


set_numpy_threads(1)


def prepare_children() -> None:
    """Sets the environment that processes inherit; see in_children/sitecustomize.py.

    A process of the suite that imports its helpers has inherited it.
    """
    if "MLX_FLASH_TEST_IMPORTS" in os.environ:
        return
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # as mlx-lm sets it, when it is imported first
    from transformers.utils import import_utils

    models = Path(import_utils.__file__).parents[1] / "models"
    handle, name = tempfile.mkstemp(prefix="mlx_flash-imports-")
    atexit.register(os.unlink, name)
    with os.fdopen(handle, "wb") as file:
        pickle.dump(import_utils.define_import_structure(str(models)), file)
    os.environ["MLX_FLASH_TEST_IMPORTS"] = name
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else each process compiles this package anew
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [FOR_CHILDREN, os.environ.get("PYTHONPATH")]))
