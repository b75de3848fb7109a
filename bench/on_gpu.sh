#!/usr/bin/env bash
# On a Linux machine with an NVIDIA GPU: the exactness tests, then naive against flash loading, with MLX's CUDA backend.
# Its asynchronous device is the nearest to Metal's that can be tried away from a Mac. Needs Python >= 3.11, a C compiler,
# a driver for CUDA 13 (or MLX_CUDA=cuda12), 12 GB of disk, and root for the memory limit.
#
#     bench/on_gpu.sh [FOLDER]      FOLDER: where the synthetic store goes (default: a temporary one, removed at the end)
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:-}
if [ -z "$folder" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
fi
python3 -m venv .venv-gpu
.venv-gpu/bin/pip install -q -e ".[test,bench]"
# Both back ends bring the same library: the CPU's goes before the GPU's comes.
version=$(.venv-gpu/bin/pip show mlx | sed -n 's/^Version: //p')
.venv-gpu/bin/pip uninstall -q -y mlx-cpu
.venv-gpu/bin/pip install -q "mlx[${MLX_CUDA:-cuda13}]==$version"
python=.venv-gpu/bin/python
$python - <<'PYTHON'
import mlx.core as mx
assert mx.default_device() == mx.gpu, f"MLX computes on {mx.default_device()}: no CUDA device found"
print(mx.device_info())
PYTHON
export MLX_ENABLE_TF32=0  # Otherwise float32 products are off by 3e-4, more than the tests allow.
.venv-gpu/bin/pytest -q tests/test_neurons.py tests/test_stream.py tests/test_predictors.py
[ -e "$folder/opt-1.3b" ] || $python -m mlx_flash.bench synthetic --shape 1.3b --output "$folder/opt-1.3b"
$python -m mlx_flash.bench naive-vs-flash --model "$folder/opt-1.3b" --tokens 128 --output bench-results
