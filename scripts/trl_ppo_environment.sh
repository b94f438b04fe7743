#!/usr/bin/env bash
# Install the last TRL with a PPOTrainer for `python -m benchmarks.compare ppo-step --trl-ppo FOLDER`:
#   ./scripts/trl_ppo_environment.sh FOLDER
# FOLDER gets that TRL alone; its process takes torch, transformers and the rest from the environment that the benchmark runs in.
set -euo pipefail

version=1.12.0
folder=${1:?expected a folder to install TRL $version into}
if [ -e "$folder" ] && [ ! -d "$folder/trl-$version.dist-info" ] && [ -n "$(ls -A "$folder")" ]; then
    echo "$folder: expected a new or empty folder, or one of this script's, got other files" >&2
    exit 2
fi
[ -d "$folder/trl-$version.dist-info" ] || \
    python -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" "trl==$version"
