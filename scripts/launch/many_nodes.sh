#!/usr/bin/env bash
# Train on several machines: run the same command on each, with its own NODE_RANK. `fastalign preflight` runs first.
# Usage: NNODES=2 NODE_RANK=0 RDZV=first-host:29500 scripts/launch/many_nodes.sh COMMAND FLAGS
# NNODES: number of machines. NODE_RANK: number of this one, from 0. RDZV: address of machine 0 and a free port there. NPROC: processes
# per machine, the same on each (default: number of GPUs that torch sees). PREFLIGHT_SECONDS: time limit of the check (default 50);
# all machines must be started in its first half. SAVE_SECONDS: time from SIGTERM to SIGKILL (default 150). PYTHON: interpreter
# (default python).
set -euo pipefail
PYTHON=${PYTHON:-python}

fail() {
    echo "many_nodes: $1" >&2
    exit 2
}
[ $# -gt 0 ] || fail "expected a command and its flags, such as: dpo --config run.yaml"
[[ "${NNODES:-}" =~ ^[1-9][0-9]*$ ]] || fail "NNODES: expected the number of machines, got '${NNODES:-}'"
[[ "${NODE_RANK:-}" =~ ^[0-9]+$ ]] && [ "$NODE_RANK" -lt "$NNODES" ] ||
    fail "NODE_RANK: expected this machine's number, from 0 to $((NNODES - 1)), got '${NODE_RANK:-}'"
[[ "${RDZV:-}" =~ ^(.+):([0-9]+)$ ]] || fail "RDZV: expected machine 0's host:port, got '${RDZV:-}'"
host=${BASH_REMATCH[1]} port=${BASH_REMATCH[2]}
NPROC=${NPROC:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}
[[ "$NPROC" =~ ^[1-9][0-9]*$ ]] || fail "expected a positive number of processes, got NPROC=$NPROC"
seconds=${PREFLIGHT_SECONDS:-50}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SAVE_SECONDS:-150}

# The check's ranks are started without torchrun: it would wait for a machine that does not come, without naming it.
alone=0
if [ "$1" = preflight ]; then
    alone=1
    shift
fi
size=$((NNODES * NPROC)) pids=() code=0
for ((i = 0; i < NPROC; i++)); do
    RANK=$((NODE_RANK * NPROC + i)) LOCAL_RANK=$i LOCAL_WORLD_SIZE=$NPROC WORLD_SIZE=$size MASTER_ADDR=$host MASTER_PORT=$port \
        "$PYTHON" -m fastalign preflight --timeout-seconds "$seconds" --world-size "$size" "$@" &
    pids+=($!)
done
trap 'kill "${pids[@]}" 2>/dev/null || true; exit 143' TERM INT
for pid in "${pids[@]}"; do
    wait "$pid" || code=2
done
trap - TERM INT
[ "$code" = 0 ] || exit 2
[ "$alone" = 1 ] || exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$NPROC" \
    --rdzv-backend c10d --rdzv-endpoint "$RDZV" --rdzv-id "${RDZV_ID:-fastalign}" --rdzv-conf "is_host=$((NODE_RANK == 0))" \
    -m fastalign "$@"
