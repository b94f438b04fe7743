# Sourced by the other scripts: make .venv once and install fastalign with the tested versions.
# FASTALIGN_VENV and PYTHON choose another folder and interpreter, FASTALIGN_EXTRAS the extras.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
FASTALIGN_VENV=${FASTALIGN_VENV:-.venv}
FASTALIGN_EXTRAS=${FASTALIGN_EXTRAS:-}

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "fastalign needs Python 3.11 or newer; '$PYTHON' is $("$PYTHON" --version 2>&1). Set PYTHON=..." >&2
    exit 2
fi

# The stamp records what was installed, and the extras of every call: a second call starts at once, a changed pin reinstalls
# all of them, another extra is added.
stamp="$FASTALIGN_VENV/.fastalign-installed"
wanted=$(cat pyproject.toml setup.py constraints.txt csrc/*.* csrc/*/*.* | cksum; echo "${FASTALIGN_NATIVE:-1}")
known= extras=
if [ -f "$stamp" ]; then
    known=$(sed -n 1,2p "$stamp")
    extras=$(sed -n 3p "$stamp")
fi
for extra in ${FASTALIGN_EXTRAS//,/ }; do
    case ",$extras," in *",$extra,"*) continue ;; esac
    extras=${extras:+$extras,}$extra
    known=
done
if [ "$known" != "$wanted" ]; then
    echo "Installing into $FASTALIGN_VENV (once; a few minutes)"
    [ -x "$FASTALIGN_VENV/bin/python" ] || "$PYTHON" -m venv "$FASTALIGN_VENV"
    # torch first and pinned, so that no later step replaces it by another build. Python compiles what is imported: a sixth of the
    # environment would be bytecode that nobody runs.
    "$FASTALIGN_VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt torch
    "$FASTALIGN_VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt \
        -e ".${extras:+[$extras]}"
    printf '%s\n%s\n' "$wanted" "$extras" > "$stamp"
fi
unset known extras extra wanted stamp
export PATH="$PWD/$FASTALIGN_VENV/bin:$PATH"
case "$FASTALIGN_VENV" in /*) export PATH="$FASTALIGN_VENV/bin:$PATH" ;; esac
