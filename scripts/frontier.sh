#!/usr/bin/env bash
# Reward against KL of eight methods at four strengths and three seeds, on a CPU: preferred fine-tuning, DPO, IPO, DPO with
# ties, online DPO, PPO under the learned and under the true reward, best of n. One table, one picture.
# Usage: ./scripts/frontier.sh [--quick] [FOLDER]     (default runs/frontier or runs/frontier-quick; a second call goes on)
set -euo pipefail
quick=()
if [ "${1:-}" = --quick ]; then
    quick=(--quick)
    shift
fi
folder=$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../runs/frontier${quick:+-quick}}")
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec python scripts/frontier.py "$folder" "${quick[@]}"
