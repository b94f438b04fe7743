"""The Triton kernels compile ahead of time for GPUs that are not here, without spills."""

import json
import os
import subprocess
import sys

import pytest

CODE = """
import json, re, subprocess, sys, tempfile, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fastalign.ops.token_logprob import triton_kernels as k

def compile_kernel(kernel, dtype, constants, architecture):
    pointers = {"logits_ptr": dtype, "gradient_ptr": dtype, "targets_ptr": "i64"}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + pointers.get(name, "fp32")
        else:
            signature[name] = "fp32" if name == "softcap" else "i64"
    source = ASTSource(kernel, signature, constexprs=constants)
    target = GPUTarget("cuda", architecture, 32)
    return triton.compile(source, target=target, options={"num_warps": 8})

def spilled(cubin):
    # What the assembler put on the stack of a thread, in bytes.
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(n) for n in re.findall(r"STACK:(\\d+)", done.stdout)]

architecture = int(sys.argv[1])
out = []
for dtype in ("fp32", "bf16", "fp16"):
    base = {"HAS_TEMPERATURE": True, "HAS_SOFTCAP": True, "BLOCK": k.MAX_BLOCK}
    backward = {**base, "HAS_GRAD_ENTROPY": True}
    kernels = ((k.token_logprob_fwd_kernel, base), (k.token_logprob_bwd_kernel, backward))
    for kernel, constants in kernels:
        found = compile_kernel(kernel, dtype, constants, architecture)
        spills = spilled(found.asm["cubin"])
        out.append([kernel.__name__, dtype, found.metadata.shared, spills])
print(json.dumps(out))
"""


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_token_logprob_compiles_for(architecture: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(architecture)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = json.loads(done.stdout.splitlines()[-1])
    assert len(compiled) == 6
    # Reductions over warps only: a few words each.
    assert all(shared <= 1024 and spills == [0] for *_, shared, spills in compiled), compiled
