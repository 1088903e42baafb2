#!/usr/bin/env bash
# One clip on two machines with eight GPUs each. Run this script on both, with the settings of the run as arguments:
#   export CHECKPOINT=/data/Cosmos3-Super
#   NODE_RANK=0 MASTER_ADDR=first-host examples/cluster/torchrun.sh task.prompt='a red kite'
#   NODE_RANK=1 MASTER_ADDR=first-host examples/cluster/torchrun.sh task.prompt='a red kite'
# Both machines need the same settings, the same versions, and the checkpoint under the same path.
set -euo pipefail

exec torchrun \
    --nnodes=2 \
    --nproc-per-node=8 \
    --node-rank="${NODE_RANK:?the number of this machine: 0 or 1}" \
    --master-addr="${MASTER_ADDR:?the name of machine 0}" \
    --master-port="${MASTER_PORT:-29500}" \
    -m cosmos3_pipeline \
    model=super model.path="${CHECKPOINT:?the folder of the checkpoint}" topology=h100_x16 weights=sharded "$@"
