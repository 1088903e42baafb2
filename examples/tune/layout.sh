#!/usr/bin/env bash
# Finds the layout of Nano on four H200 that fits and has the least planned seconds. Plans need no GPU and no weights.
# Further arguments are overrides: ./examples/tune/layout.sh model=super
set -euo pipefail
cd "$(dirname "$0")/../.."
exec .venv/bin/python launch.py -m \
    hydra/sweeper=optuna hydra/sweeper/sampler=grid hydra.sweeper.n_trials=100 \
    hydra.sweeper.direction=minimize hydra.sweeper.max_failure_rate=1.0 \
    job=plan model=nano topology=h200_x4 objective=seconds \
    'topology.cfg=choice(1,2)' 'topology.ulysses=choice(1,2,4)' \
    'vae/decode=choice(layer_pipeline,spatial_shard)' "$@"
