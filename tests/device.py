"""MLX_FLASH_TEST_DEVICE=cpu: the suite computes on the CPU where MLX would take the GPU, in its processes as well.

To be imported before mlx-lm, which makes a stream on the default device.
"""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx

ON_CPU = os.environ.get("MLX_FLASH_TEST_DEVICE") == "cpu"
if ON_CPU:
    mx.set_default_device(mx.cpu)
    for_children = str(Path(__file__).with_name("on_cpu"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [for_children, os.environ.get("PYTHONPATH")]))
