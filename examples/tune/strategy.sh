#!/usr/bin/env bash
# Measures which strategy decodes fastest on two ranks of this machine, with one run each. For medians of several runs
# sweep without Optuna: launch.py -m vae/decode=layer_pipeline,spatial_shard sweep.repeats=5
set -euo pipefail
cd "$(dirname "$0")/../.."
exec .venv/bin/python launch.py -m \
    hydra/sweeper=optuna hydra/sweeper/sampler=grid hydra.sweeper.n_trials=100 \
    hydra.sweeper.direction=minimize hydra.sweeper.max_failure_rate=1.0 \
    topology=cpu_x2 objective=seconds.decode \
    'vae/decode=choice(layer_pipeline,spatial_shard,pipeline_of_shards)' "$@"
