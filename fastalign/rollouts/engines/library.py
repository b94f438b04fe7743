"""The parts of vLLM's library that are used: the only file that imports it, and only in calls."""

from typing import Any

from fastalign.rollouts.engines.spec import EngineSpec, lora_room


def on_cpu() -> bool:
    """Return True if the installed build is the one for CPUs."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def build_llm(folder: str, spec: EngineSpec) -> Any:
    """Build an engine for the configuration in a folder.

    Raises:
        ValueError: if vLLM refuses the model, the settings or the adapter's rank.
    """
    from vllm import LLM

    arguments = engine_arguments(spec)
    try:
        return LLM(model=folder, **arguments)
    except ValueError as error:
        why = " ".join(str(error).split())
        hint = " (--vllm.gpu-memory, on a CPU --vllm.kv-cache-gib)" if "memory" in why else ""
        raise ValueError(
            f"sampler: vLLM refuses this model or these settings{hint}: {why}"
        ) from error


def engine_arguments(spec: EngineSpec) -> dict[str, Any]:
    """Return the arguments of `LLM`: no weights, no tokenizer, log-probs of what is drawn from."""
    options = spec.options
    arguments: dict[str, Any] = {
        "runner": "generate",
        "dtype": str(spec.dtype).removeprefix("torch."),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "max_model_len": spec.limit,
        "max_num_seqs": options.max_sequences,
        "enforce_eager": options.eager or on_cpu(),
    }
    if on_cpu():
        arguments["kv_cache_memory_bytes"] = int(options.kv_cache_gib * 2**30)
    else:
        arguments["gpu_memory_utilization"] = options.gpu_memory
        arguments["enable_sleep_mode"] = options.sleep
    if spec.lora_rank:
        room = lora_room(spec.lora_rank)
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}
    return arguments


def request_params(fields: dict[str, Any]) -> Any:
    """Return a request's parameters: answered once, with the drawn tokens' log-probs."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    kind = RequestOutputKind.FINAL_ONLY
    return SamplingParams(**fields, logprobs=0, detokenize=False, output_kind=kind)


def adapter_request(number: int, folder: str) -> Any:
    """Return the request for an adapter, whose name is new with every number."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"policy-{number}", number, folder)


def check_native(architecture: str) -> None:
    """Check that vLLM has an implementation of its own of an architecture.

    It runs others by transformers' classes, which it changes for the whole process.

    Raises:
        ValueError: if it has none: the policy's own forwards would break.
    """
    from vllm.model_executor.models import ModelRegistry

    registered = ModelRegistry.models.get(architecture)
    if registered is None or ".transformers" in getattr(registered, "module_name", ""):
        raise ValueError(
            f"sampler: vLLM has no {architecture} of its own and changes transformers' in this "
            "process, where the policy needs it; expected --sampler vllm-server"
        )
