"""Check a fastalign that was installed from a package: a fused loss on its kernels, two DPO steps.

    python scripts/check_package.py native        # a wheel for this platform
    python scripts/check_package.py reference     # a wheel without native code

Run it with the environment's own interpreter, and with no compiler on PATH (scripts/packages.sh).
"""

import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import torch

ROOT = Path(__file__).resolve().parents[1]
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc")


def fused_loss(backend: str) -> tuple[float, float]:
    """Return the largest relative errors of a fused DPO loss and of its gradients."""
    from fastalign import fused_linear_dpo_loss

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 64, generator=generator).requires_grad_()
    weight = torch.randn(1000, 64, generator=generator).requires_grad_()
    targets = torch.randint(1000, (40,), generator=generator)
    targets[::10] = -100
    reference = torch.randn(4, generator=generator)
    loss, _ = fused_linear_dpo_loss(
        hidden,
        weight,
        targets,
        cu_seqlens=torch.arange(0, 41, 10),
        reference_logprob=reference,
        beta=0.1,
        backend=backend,
    )
    gradients = torch.autograd.grad(loss, (hidden, weight))

    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logprob = (wide[0] @ wide[1].T).log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    ratios = (logprob * (targets >= 0)).view(4, 10).sum(1) - reference
    exact = -torch.nn.functional.logsigmoid(0.1 * (ratios[::2] - ratios[1::2])).mean()
    truths = torch.autograd.grad(exact, wide)
    error = max(
        ((gradient - truth).abs().max() / truth.abs().max()).item()
        for gradient, truth in zip(gradients, truths, strict=True)
    )
    return abs((loss / exact).item() - 1), error


def trained(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of two DPO steps of a new model by the installed command."""
    from fastalign import samples

    data = samples.folder("pros_cons")
    texts = ["--data.train", str(data / "texts_eval.jsonl")]
    size = ["--vocab-size", "300", "--hidden-size", "32", "--layers", "1", "--heads", "2"]
    steps = ["--train.max-steps", "2", "--train.batch-size", "2", "--data.ties", "drop"]
    steps += ["--reference.cache-dir", str(folder / "cache")]
    pairs = folder / "pairs.jsonl"
    pairs.write_text("\n".join((data / "pairs_eval.jsonl").read_text().splitlines()[:20]))
    command("new-model", *texts, *size, "--out", str(folder / "model"))
    model = ["--model.path", str(folder / "model"), "--data.train", str(pairs)]
    command("dpo", *model, *steps, "--run.dir", str(folder / "run"))
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def command(*arguments: str) -> None:
    """Run `fastalign`, and raise SystemExit with its output if it fails."""
    line = [sys.executable, "-m", "fastalign", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}: exit code {done.returncode}\n{done.stderr}")


def main(arguments: Sequence[str]) -> int:
    """Check the package; return 0, or raise SystemExit with what is wrong."""
    kind, *libraries = arguments or [""]
    if kind not in ("native", "reference"):
        raise SystemExit(f"expected native or reference, got {kind!r}")
    package = Path(importlib.import_module("fastalign").__file__ or "").resolve().parent
    if package == ROOT / "fastalign":
        raise SystemExit(f"fastalign is this checkout, {ROOT}: install a package first")
    found = [name for name in COMPILERS if shutil.which(name)]
    if found:
        raise SystemExit(f"PATH has compilers, which a user may not have: {', '.join(found)}")
    built = sorted(path.name for path in (package / "_native").glob("*"))
    from fastalign.ops import native_library
    from fastalign.ops.head.arguments import choose_linear_backend

    wanted = libraries or (["cpu"] if kind == "native" else [])
    if built != sorted(f"libfastalign_{device}.so" for device in wanted):
        raise SystemExit(f"expected libraries for {wanted or 'nothing'}, found {built}")
    for device in wanted:
        if reason := native_library.unusable_reason(device):
            raise SystemExit(f"native code for {device}: {reason}")
    chosen = choose_linear_backend("fused_linear_loss", "auto", "cpu", torch.float32)
    if (chosen == "native") != (kind == "native"):
        raise SystemExit(f"auto takes {chosen!r}, expected {kind}")
    errors = fused_loss("native" if kind == "native" else "auto")
    if not max(errors) < 1e-4:
        raise SystemExit(f"relative errors of the fused loss and its gradients: {errors}")
    begin = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = trained(Path(folder))
    if len(rows) != 2:
        raise SystemExit(f"expected two steps of DPO, got {rows}")
    size = sum(path.stat().st_size for path in package.rglob("*") if path.is_file()) / 2**20
    print(
        f"fastalign {version('fastalign')}, Python {sys.version.split()[0]}, torch "
        f"{torch.__version__}: {', '.join(built) or 'no libraries'}; fused loss by {chosen!r}, "
        f"error {max(errors):.0e}; two DPO steps in {perf_counter() - begin:.0f} s; {size:.1f} MiB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
