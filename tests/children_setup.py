"""Sets up the environment of the processes that tests start.

With MLX_FLASH_TEST_DEVICE=cpu, the suite and its processes compute on the CPU even if MLX would use the GPU. Import
this file before mlx-lm, which makes a stream on the default device.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import pickle
import tempfile
from pathlib import Path

# OpenBLAS's threads wait for each other at full load. For the small matrices here that takes most of their time.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
if (set_threads := getattr(ctypes.CDLL(None), "openblas_set_num_threads", None)) is not None:
    set_threads(1)  # applies to a library that is already loaded

import mlx.core as mx

FOR_CHILDREN = str(Path(__file__).with_name("in_children"))
ON_CPU = os.environ.get("MLX_FLASH_TEST_DEVICE") == "cpu"
if ON_CPU:
    mx.set_default_device(mx.cpu)


def set_numpy_threads(count: int) -> None:
    """Sets the threads of NumPy's own OpenBLAS, which has read the environment if NumPy was loaded before this file."""
    import numpy as np

    for path in Path(np.__file__).parents[1].glob("numpy.libs/libscipy_openblas*"):
        for name in ("scipy_openblas_set_num_threads64_", "scipy_openblas_set_num_threads"):
            if (set_threads := getattr(ctypes.CDLL(str(path)), name, None)) is not None:
                set_threads(count)


set_numpy_threads(1)


def prepare_children() -> None:
    """Sets the environment that child processes inherit; see in_children/sitecustomize.py.

    A child process that imports this file has inherited it already.
    """
    if "MLX_FLASH_TEST_IMPORTS" in os.environ:
        return
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # mlx-lm also sets this when it is imported first
    from transformers.utils import import_utils

    models = Path(import_utils.__file__).parents[1] / "models"
    handle, name = tempfile.mkstemp(prefix="mlx_flash-imports-")
    atexit.register(os.unlink, name)
    with os.fdopen(handle, "wb") as file:
        pickle.dump(import_utils.define_import_structure(str(models)), file)
    os.environ["MLX_FLASH_TEST_IMPORTS"] = name
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # otherwise each process compiles this package again
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [FOR_CHILDREN, os.environ.get("PYTHONPATH")]))
