#!/usr/bin/env bash
# All tests, after the static checks: ./scripts/test.sh [pytest arguments]
set -euo pipefail
FASTALIGN_EXTRAS=dev
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

scripts/check.sh
python -m pytest "$@"
