#!/usr/bin/env bash
# Chromium from the distribution's packages, for the browser tests of `fastalign compare`; once, and only as root. Without it those
# tests are skipped. CHROMIUM names another one.
set -euo pipefail
[ -n "${CHROMIUM:-}" ] && exit 0
command -v chromium chromium-browser >/dev/null && exit 0
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "no Chromium: the browser tests are skipped (install the package chromium, or set CHROMIUM)"
    exit 0
fi
echo "Installing Chromium from the distribution's packages (once)"
if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } >/dev/null 2>&1; then
    echo "Chromium could not be installed: the browser tests are skipped"
fi
