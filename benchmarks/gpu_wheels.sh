#!/usr/bin/env bash
# Downloads the wheels that benchmarks/gpu.sh needs on a machine without a network. That machine must have Python 3.12,
# Linux on x86-64, PyTorch and Triton. The folder is below 60 MB.
#
#   benchmarks/gpu_wheels.sh [FOLDER]              # gpu-wheels
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-gpu-wheels}
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
mkdir -p "$folder"
# This package is published only as source. Its wheel is pure Python.
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" --constraint constraints.txt antlr4-python3-runtime
"$python" -m pip download --quiet --no-deps --dest "$folder" --constraint constraints.txt --find-links "$folder" \
    --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none --only-binary :all: \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --platform any --requirement benchmarks/on_gpu/wheels.txt
du -sh "$folder"
