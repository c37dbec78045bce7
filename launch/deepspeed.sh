#!/usr/bin/env bash
# The recipe under the deepspeed launcher. Started on one machine; it reaches the others by ssh without a password:
#
#   launch/deepspeed.sh --config configs/pretrain/tiny.yaml --deepspeed_config configs/zero2.json
#   HOSTFILE=hosts launch/deepspeed.sh ...                              # lines such as: node0 slots=8
#   HOSTFILE=hosts RUNNER=openmpi INTERFACE=eth0 launch/deepspeed.sh ...
#
# The environment, this folder and what it reads must be at the same paths on all machines. Of the variables set here only
# those that begin with PYTHON, MV2 or UCX go to the others; write the rest (OMP_NUM_THREADS=1, GLOO_SOCKET_IFNAME=eth0) as
# lines into ./.deepspeed_env or ~/.deepspeed_env.
set -euo pipefail

HOSTFILE=${HOSTFILE:-}                  # empty: this machine alone
NPROC_PER_NODE=${NPROC_PER_NODE:-1}     # ranks on this machine; with a hostfile its slots are
RUNNER=${RUNNER:-pdsh}                  # pdsh or openmpi: what starts the ranks on the machines of the hostfile
MASTER_ADDR=${MASTER_ADDR:-}            # where ranks meet; empty: loopback, or the first machine's first address
MASTER_PORT=${MASTER_PORT:-29500}       # a port that is free there; with openmpi rank 0 finds one
INTERFACE=${INTERFACE:-eth0}            # openmpi: the network interface between the machines
SCRIPT=${SCRIPT:-$(dirname "$0")/pretrain.py}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ -z "$HOSTFILE" ]; then
    # Without a hostfile named the launcher would take /job/hostfile if there is one.
    where=(--hostfile /dev/null --num_accelerators "$NPROC_PER_NODE" --master_addr "${MASTER_ADDR:-127.0.0.1}")
elif [ "$RUNNER" = pdsh ]; then
    where=(--hostfile "$HOSTFILE" --launcher pdsh --force_multi)
elif [ "$RUNNER" = openmpi ]; then
    # oob: mpirun's own connections. The ranks find each other with mpi4py, as under launch/mpirun.sh.
    mpi="--mca btl_tcp_if_include $INTERFACE --prtemca oob_tcp_if_include $INTERFACE --bind-to none"
    [ "$(id -u)" != 0 ] || mpi+=" --allow-run-as-root"  # containers run as root, which mpirun refuses by itself
    where=(--hostfile "$HOSTFILE" --launcher openmpi --force_multi --launcher_args "$mpi")
else
    echo "deepspeed.sh: RUNNER=$RUNNER; expected pdsh or openmpi" >&2
    exit 2
fi
[ -z "$HOSTFILE" ] || [ -z "$MASTER_ADDR" ] || where+=(--master_addr "$MASTER_ADDR")
exec deepspeed --master_port "$MASTER_PORT" "${where[@]}" "$SCRIPT" "$@"
