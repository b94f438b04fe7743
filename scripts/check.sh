#!/usr/bin/env bash
# Every check that needs no run: lint, format, types, layers, native sources' format.
set -euo pipefail
FASTALIGN_EXTRAS=dev
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ruff check .
ruff format --check .
mypy
lint-imports
find csrc tests/ops -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs clang-format --style=file:csrc/.clang-format --dry-run --Werror
