#!/usr/bin/env bash
# Train without Ray. On one machine:
#
#   launch/torchrun.sh CONFIG [section.key=value …]                                  # WORKERS ranks here (default: GPUs, else 2)
#
# On several, the same command on each of them, run.dir and data on storage that all of them see:
#
#   MASTER_ADDR=first-host NODES=4 launch/torchrun.sh CONFIG …
#
# A rank that dies restarts all of them from the newest checkpoint, MAX_RESTARTS (3) times. SIGTERM and Ctrl-C save a checkpoint
# first (SHUTDOWN_S, 120 seconds); the same command continues the run.
set -euo pipefail

[ $# -gt 0 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
here=$(cd "$(dirname "$0")/.." && pwd)
[ -x "$here/.venv/bin/python" ] && PATH=$here/.venv/bin:$PATH
nodes=${NODES:-1}
gpus=$(nvidia-smi --list-gpus 2> /dev/null | wc -l || true)
workers=${WORKERS:-$((gpus > 0 ? gpus : 2))}

if [ "$nodes" -gt 1 ]; then
  : "${MASTER_ADDR:?the first host, for several nodes}"
  # gloo binds to what the hostname resolves to, often a loopback: name the interface that leads to the first host.
  address=$(getent ahostsv4 "$MASTER_ADDR" | awk 'NR == 1 {print $1}')
  interface=$(ip -o route get "$address" | sed -n 's/.* dev \([^ ]*\).*/\1/p')
  if [ "$interface" = lo ]; then # this is the first host
    interface=$(ip -o -4 addr show | awk -v a="$address" '{split($4, ip, "/"); if (ip[1] == a) print $2}')
  fi
  export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface} NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$interface}
  rendezvous=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29400}" --rdzv-id "${RUN_ID:-distmtl}")
else
  rendezvous=(--standalone)
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# As distmtl/cluster/trainer.py: a step's large tensors stay with the process instead of costing page faults anew in every step.
export MALLOC_ARENA_MAX=${MALLOC_ARENA_MAX:-1} MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-$((1 << 28))}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-$((1 << 30))} MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-$((1 << 26))}
export ARROW_DEFAULT_MEMORY_POOL=${ARROW_DEFAULT_MEMORY_POOL:-system}
exec python -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$workers" "${rendezvous[@]}" \
  --max-restarts "${MAX_RESTARTS:-3}" --shutdown-timeout "${SHUTDOWN_S:-120}" -m distmtl train "$@"
