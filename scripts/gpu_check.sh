#!/usr/bin/env bash
# On a machine with a CUDA device: the operations' tests on it, then the benchmarks; writes benchmarks/results/<device>/*.json.
set -euo pipefail
FASTALIGN_EXTRAS=dev
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

device=$(python -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device"; print(torch.cuda.get_device_name().replace(" ", "-"))')
folder=benchmarks/results/$device
mkdir -p "$folder"
fastalign doctor
FASTALIGN_TEST_GPU=1 python -m pytest tests/gpu -q
for name in linear-logprob dpo-loss; do
    python -m benchmarks.compare "$name" --device cuda --json "$folder/$name.json"
done
