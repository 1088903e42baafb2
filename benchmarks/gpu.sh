#!/usr/bin/env bash
# Verifies and measures on this machine's GPUs, and writes one report to paste: outputs/gpu/report.md. See docs/gpu.md.
#
#   benchmarks/gpu.sh                              # uses the existing environment: .venv, or python3
#   benchmarks/gpu.sh --wheels gpu-wheels          # a bare machine with torch: all other packages are these wheels
#   benchmarks/gpu.sh --device cpu --small         # rehearses every line without a GPU
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
[ -n "${PYTHON:-}" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python

if [ "${1:-}" = --wheels ]; then
    wheels=$2
    shift 2
    outer=${PYTHON:-python3}
    venv=${GPU_VENV:-.venv-gpu}
    "$outer" -m venv --without-pip --system-site-packages "$venv"
    python=$venv/bin/python
    # If python3 belongs to a venv, --system-site-packages does not add that venv's packages, but outer.pth does.
    "$outer" -c "import sysconfig; print('\n'.join({sysconfig.get_path(k) for k in ('purelib', 'platlib')}))" \
        > "$("$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/outer.pth"
    # Do not compile: a step compiles the modules that it imports, and most modules are never imported.
    "$outer" -m pip --python "$python" install --quiet --no-compile --no-index --find-links "$wheels" --no-deps --upgrade \
        --requirement benchmarks/on_gpu/wheels.txt --editable .
fi
PYTHONPATH=benchmarks${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m on_gpu "$@"
