#!/usr/bin/env bash
# On a machine with a CUDA device: build, test every kernel, and benchmark the passes and the head beside its peers. Writes
# benchmarks/results/<device>/*.json and a readable table for each.
# Usage: ./scripts/gpu_check.sh               make .venv from the network
#        FASTALIGN_PYTHON=python3 ./scripts/gpu_check.sh     use an interpreter with torch, triton, pytest, pytest-timeout and tyro
#                                             (optionally transformers, trl, liger-kernel and cut-cross-entropy)
#        ./scripts/gpu_check.sh --dry-run     check without a GPU: compiled kernels' resources, the tests' collection
set -euo pipefail
if [ -n "${FASTALIGN_PYTHON:-}" ]; then
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    missing=$("$FASTALIGN_PYTHON" -c 'import importlib.util as u; print(*(n for n in ("torch", "triton", "pytest", "pytest_timeout", "tyro") if not u.find_spec(n)))')
    if [ -n "$missing" ]; then
        echo "gpu_check: $FASTALIGN_PYTHON lacks: $missing" >&2
        exit 2
    fi
    export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
else
    FASTALIGN_EXTRAS=dev
    . "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
fi
python=${FASTALIGN_PYTHON:-python}

if [ "${1:-}" = --dry-run ]; then
    "$python" -m tests.ops.kernel_resources
    FASTALIGN_TEST_GPU=1 "$python" -m pytest tests/gpu -q --collect-only | tail -n 2
    exit
fi
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "")')
if [ -z "$device" ]; then
    echo "gpu_check: torch sees no CUDA device here; --dry-run makes the checks that need none" >&2
    exit 2
fi
if [ -n "${FASTALIGN_PYTHON:-}" ]; then
    # only this device's code, which saves minutes
    FASTALIGN_CUDA_ARCHITECTURES=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') \
        "$python" setup.py -q build_ext --inplace
fi
folder=benchmarks/results/$device
mkdir -p "$folder"
"$python" -m fastalign doctor | tee "$folder/doctor.txt"
FASTALIGN_TEST_GPU=1 "$python" -m pytest tests/gpu -q
for name in operations head; do
    "$python" -m benchmarks.compare "$name" --device cuda --json "$folder/$name.json" --overwrite | tee "$folder/$name.txt"
done
if "$python" -c 'import transformers, datasets, trl' 2>/dev/null; then  # optimiser steps; run the other shapes by hand
    "$python" -m benchmarks.compare dpo-step --device cuda --model llama-3.2-1b --case long-prompts --rounds 3 \
        --json "$folder/dpo-step.json" --overwrite | tee "$folder/dpo-step.txt"
fi
