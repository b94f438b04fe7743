#!/usr/bin/env bash
# On a machine with a CUDA device: kernel tests and measurements in three stages of nine minutes.
# Usage: ./scripts/gpu_check.sh --out FOLDER        all stages; .venv is made from the network
#        ./scripts/gpu_check.sh 2 --out FOLDER      one stage (1: kernels, 2: the head, 3: attention and steps)
#        FASTALIGN_PYTHON=python3 ./scripts/gpu_check.sh 1 --out FOLDER    an interpreter that has torch, Triton and pytest
#        ./scripts/gpu_check.sh --dry-run           without a GPU: compiled kernels, steps, and what to carry
# FOLDER/STAGE/NAME.json is written as each step ends: see benchmarks/gpu_check.
set -euo pipefail
if [ -n "${FASTALIGN_PYTHON:-}" ]; then
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
else
    FASTALIGN_EXTRAS=dev
    . "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
fi
exec "${FASTALIGN_PYTHON:-python}" -m benchmarks.gpu_check "$@"
