#!/usr/bin/env bash
# The recipe under torchrun. Started once on each machine, at about the same time, with the same arguments:
#
#   launch/torchrun.sh --config configs/pretrain/tiny.yaml --deepspeed_config configs/zero2.json
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh ...       # on node0, and NODE_RANK=1 on the other
#   NNODES=2 RDZV_ENDPOINT=node0:29400 MAX_RESTARTS=3 launch/torchrun.sh ... --resume
set -euo pipefail

NNODES=${NNODES:-1}                     # machines
NPROC_PER_NODE=${NPROC_PER_NODE:-1}     # ranks on this machine: one a GPU; on CPU, cores / OMP_NUM_THREADS
NODE_RANK=${NODE_RANK:-0}               # number of this machine; the first is where ranks meet
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}   # of machine 0. Loopback unless you say otherwise
MASTER_PORT=${MASTER_PORT:-29500}       # a port that is free on machine 0
RDZV_ENDPOINT=${RDZV_ENDPOINT:-}        # host:port: machines find each other there and NODE_RANK is given out
RDZV_ID=${RDZV_ID:-gwt_dist}            # name of this job at that endpoint
MAX_RESTARTS=${MAX_RESTARTS:-0}         # with --resume: from the newest checkpoint, see docs/resume.md
SCRIPT=${SCRIPT:-$(dirname "$0")/pretrain.py}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# torch keeps one store for all attempts, in which new ranks find the addresses of dead ones (pytorch#135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

if [ "$NNODES" != 1 ] && [ -z "$RDZV_ENDPOINT" ] && [ "$MASTER_ADDR" = 127.0.0.1 ]; then
    echo "torchrun.sh: NNODES=$NNODES, but MASTER_ADDR is loopback, where no other machine is; set MASTER_ADDR to machine 0" >&2
    exit 2
fi
if [ -n "$RDZV_ENDPOINT" ]; then
    where=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "$RDZV_ID")
else
    where=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
fi
# By module, so that it is the torchrun of the Python that is first in PATH.
exec python -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" \
    --max-restarts "$MAX_RESTARTS" "${where[@]}" "$SCRIPT" "$@"
