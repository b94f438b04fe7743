#!/usr/bin/env bash
# Build the documentation's site from docs/ and from the code into build/site; a warning is an error.
# Usage: ./scripts/docs.sh [FOLDER]         (default build/site; open FOLDER/index.html, no server is needed)
#        ./scripts/docs.sh --serve          rebuild and show it while you write, on loopback
set -euo pipefail
export FASTALIGN_EXTRAS=${FASTALIGN_EXTRAS:-docs}
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
export NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true
if [ "${1:-}" = --serve ]; then
    exec python -m mkdocs serve --strict --dev-addr 127.0.0.1:8000
fi
folder=$(realpath -m "${1:-build/site}")
python -m mkdocs --quiet build --strict --site-dir "$folder"
echo "$folder/index.html"
