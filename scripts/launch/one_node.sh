#!/usr/bin/env bash
# Train on the GPUs of this machine, one process each. `fastalign preflight` runs first.
# Usage: scripts/launch/one_node.sh COMMAND FLAGS     (scripts/launch/one_node.sh dpo --config run.yaml)
#        scripts/launch/one_node.sh preflight COMMAND FLAGS     (the check alone)
# NPROC: number of processes (default: number of GPUs that torch sees). SAVE_SECONDS: time from SIGTERM to SIGKILL (default 150).
# PYTHON: interpreter (default python).
set -euo pipefail
PYTHON=${PYTHON:-python}

if [ $# -eq 0 ]; then
    echo "one_node: expected a command and its flags, such as: dpo --config run.yaml" >&2
    exit 2
fi
NPROC=${NPROC:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}
if ! [[ "$NPROC" =~ ^[1-9][0-9]*$ ]]; then
    echo "one_node: expected a positive number of processes, got NPROC=$NPROC (without NPROC it is the number of GPUs)" >&2
    exit 2
fi
# Without OMP_NUM_THREADS torchrun would set it to 1 and warn.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SAVE_SECONDS:-150}
launch=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" -m fastalign)

alone=0
if [ "$1" = preflight ]; then
    alone=1
    shift
fi
"${launch[@]}" preflight --world-size "$NPROC" "$@" || exit 2
[ "$alone" = 1 ] || exec "${launch[@]}" "$@"
