#!/usr/bin/env bash
# Trains CONFIG on every GPU of this machine, or on two CPU ranks; on several nodes when NNODES says so.
#
#   bash launch/torchrun.sh configs/quickstart.yaml train.steps=100 run.dir=runs/short
#   NNODES=4 MASTER_ADDR=node0 bash launch/torchrun.sh configs/base_zero2.yaml      the same line on every node
#
#   NPROC_PER_NODE     ranks on this node                          (default: its GPUs, or 2)
#   NNODES             nodes, or MIN:MAX of them                   (default: 1)
#   MASTER_ADDR        one of the nodes, reachable from all        (needed when NNODES is not 1)
#   MASTER_PORT        a free port there                           (default: 29500)
#   NODE_RANK          0 to NNODES-1, 0 on MASTER_ADDR: nodes that are all known beforehand (default: as they come)
#   JOB_ID             tells this job from others at that address  (default: hourglass)
#   JOIN_TIMEOUT       seconds to wait for the other nodes         (default: 600)
#   NETWORK_INTERFACE  the one between nodes, such as eth0         (default: what NCCL and gloo choose)
#   MAX_RESTARTS       how often torchrun starts all ranks again   (default: 0)
#   SHUTDOWN_TIMEOUT   seconds to end in after a signal            (default: 300)
#   HOURGLASS_PROGRAM  train, or preflight                         (default: train)
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${VIRTUAL_ENV:-} && -f $root/.venv/bin/activate ]]; then
  source "$root/.venv/bin/activate"
fi
if ! command -v hourglass >/dev/null; then
  echo "launch/torchrun.sh: no environment: run bash launch/setup.sh first" >&2
  exit 2
fi
if [[ $# -eq 0 ]]; then
  echo "usage: bash launch/torchrun.sh CONFIG [key=value ...]" >&2
  exit 2
fi
hourglass config "$@" >/dev/null

nodes=${NNODES:-1}
ranks=${NPROC_PER_NODE:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)')}
threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
if [[ -n ${NETWORK_INTERFACE:-} ]]; then
  export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE
fi
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}

if [[ $nodes == 1 ]]; then
  meeting=(--standalone --local-addr 127.0.0.1)
else
  address=${MASTER_ADDR:-} port=${MASTER_PORT:-29500}
  if [[ -z $address ]]; then
    echo "launch/torchrun.sh: NNODES is $nodes: MASTER_ADDR must name one of the nodes" >&2
    exit 2
  fi
  if [[ -n ${NODE_RANK:-} ]]; then
    meeting=(--node-rank "$NODE_RANK" --master-addr "$address" --master-port "$port")
  else
    meeting=(--rdzv-backend c10d --rdzv-endpoint "$address:$port" --rdzv-id "${JOB_ID:-hourglass}"
      --rdzv-conf "join_timeout=${JOIN_TIMEOUT:-600}")
  fi
fi

exec python "$root/launch/torchrun.py" \
  --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-0}" "${meeting[@]}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "${SHUTDOWN_TIMEOUT:-300}" \
  -m "hourglass_dist.${HOURGLASS_PROGRAM:-train}" "$@"
