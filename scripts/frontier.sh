#!/usr/bin/env bash
# Measure reward against KL of eleven methods at four strengths and three seeds on a CPU: preferred fine-tuning, DPO, IPO, DPO
# with ties, KTO, online DPO, PPO (four models, or one base), GRPO, PPO with the true reward, best of n. Writes a table and a picture.
# Usage: ./scripts/frontier.sh [--quick] [FOLDER]     (default runs/frontier or runs/frontier-quick; a second call continues)
set -euo pipefail
quick=()
if [ "${1:-}" = --quick ]; then
    quick=(--quick)
    shift
fi
folder=$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../runs/frontier${quick:+-quick}}")
export FASTALIGN_EXTRAS=${FASTALIGN_EXTRAS:-report}
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec python scripts/frontier.py "$folder" "${quick[@]}"
