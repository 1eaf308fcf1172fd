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
#   NODE_RANK          0 to NNODES-1, 0 on MASTER_ADDR: nodes that are counted beforehand and not replaced (default: as they come)
#   NODE_NAMES         names of all nodes, to say who is missing   (default: how many are)
#   JOB_ID             tells this job from others at that address  (default: hourglass)
#   JOIN_TIMEOUT       seconds to wait for other nodes, at the start and after they were lost  (default: 600)
#   NETWORK_INTERFACE  the one between nodes, such as eth0         (default: what NCCL and gloo choose)
#   MAX_RESTARTS       how often torchrun starts all ranks again   (default: 0)
#   SHUTDOWN_TIMEOUT   seconds to end in after a signal            (default: 300)
#   RETRY_EXIT_CODE    instead of every code but 0 and 2           (default: see README.md)
#   HOURGLASS_PROGRAM  train, or preflight                         (default: train)
set -euo pipefail

refuse() {
  echo "launch/torchrun.sh: $1" >&2
  exit 2
}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ -d ${here%/*}/hourglass_dist ]]; then # a checkout: its own code runs, also where another one is installed
  export PYTHONPATH=${here%/*}${PYTHONPATH:+:$PYTHONPATH}
  environment=${VIRTUAL_ENV:-${here%/*}/.venv}
else # a wheel: ENVIRONMENT/lib/python3.X/site-packages/hourglass_dist/shipped/launch
  environment=${here%/lib/python*}
fi
if [[ :$PATH: != *:$environment/bin:* && -f $environment/bin/activate ]]; then
  source "$environment/bin/activate"
fi
python -c 'import hourglass_dist, typer' 2>/dev/null || refuse "no environment: run bash launch/setup.sh first"
[[ $# -gt 0 ]] || refuse "expected CONFIG [key=value ...], for example quickstart"

nodes=${NNODES:-1} address=${MASTER_ADDR:-} port=${MASTER_PORT:-29500}
if [[ ! $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ || ${nodes%:*} -gt ${nodes#*:} ]]; then
  refuse "NNODES: expected a number of nodes, or MIN:MAX, given $nodes"
elif [[ $nodes == 1 ]]; then
  meeting=(--standalone --local-addr 127.0.0.1)
elif [[ -z $address ]]; then
  refuse "NNODES is $nodes: MASTER_ADDR must name one of the nodes"
elif [[ -z ${NODE_RANK:-} ]]; then
  meeting=(--rdzv-backend c10d --rdzv-endpoint "$address:$port" --rdzv-id "${JOB_ID:-hourglass}")
elif [[ $nodes == *:* ]]; then
  refuse "NODE_RANK counts nodes that are all there, and NNODES is $nodes: leave one of them out"
else
  meeting=(--node-rank "$NODE_RANK" --master-addr "$address" --master-port "$port")
fi
RANK=1 python -m hourglass_dist.cli config "$@" >/dev/null # which file a bare name means is said by rank 0

ranks=${NPROC_PER_NODE:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)')}
threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
if [[ -n ${NETWORK_INTERFACE:-} ]]; then
  export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE GLOO_SOCKET_IFNAME=$NETWORK_INTERFACE
fi
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
export JOIN_TIMEOUT=${JOIN_TIMEOUT:-600}

exec python -m hourglass_dist.launch.agent \
  --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-0}" "${meeting[@]}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout "${SHUTDOWN_TIMEOUT:-300}" \
  -m "hourglass_dist.${HOURGLASS_PROGRAM:-train}" "$@"
