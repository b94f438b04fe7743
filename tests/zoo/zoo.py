"""Every causal model type of the installed transformers, built small, through every trainer."""

import json
import math
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging

from fastalign.batch.packed import Group, pack
from fastalign.compute import Compute
from fastalign.models.architecture import auto_class
from fastalign.models.exactness import Verdict, small_config, verdict
from fastalign.models.forward import response_logprob
from fastalign.models.load import choose_packing, load_policy
from fastalign.rollouts import SamplingParams
from fastalign.rollouts.transformers_sampler import TransformersSampler
from fastalign.runs.config import LoraConfig
from fastalign.trainers import train_dpo, train_reward, train_sft
from tests.small_runs import dpo_config, fill, reward_config, sft_config
from tests.tokenizers import make_tokenizer

# Text and images, of which the text model is trained.
MULTIMODAL = (
    *("aya_vision", "glm4v", "idefics3", "internvl", "lfm2_vl", "llava", "llava_next"),
    *("llava_onevision", "mistral3", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"),
    *("qwen3_vl_moe", "smolvlm"),
)
TYPES = tuple(sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MULTIMODAL}))
# What the default configuration of a type leaves out, and its models' configurations have.
CONV = ["conv", "conv", "full_attention", "conv"]
MROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
}
MROPE_OF_HALF = {
    "rope_parameters": {
        **{"rope_type": "default", "rope_theta": 1e4},
        **{"partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]},
    }
}
SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 64, "n_shared_experts": 1, "num_experts_per_tok": 6},
    "lfm2": {"num_hidden_layers": 4, "layer_types": CONV},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": CONV},
    "minimax_m3_vl_text": {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
    },
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "glm4v": {"text_config": MROPE_OF_HALF},
    "qwen2_5_vl": {"text_config": MROPE},
    "qwen2_vl": {"text_config": MROPE},
}
YES = "yes"
# Parts of messages, and what stands for them in the table.
WORDS = (
    (r"^model\.path: ", ""),
    (r"^a (causal|reward) model of type '\S+' cannot be \w+ exactly: ", ""),
    (r"a small copy, by its config\.json, fails: ", ""),
    (r"no attention layer uses the packed row's plan", "its attention does not use the plan"),
    (r"a small copy's values differ from one sequence at a time by up to ", "differs by "),
    (r", its gradients by up to \S+ of their largest entry", ""),
    (r"^transformers has no sequence classifier of this type$", "no such class"),
)


@dataclass(frozen=True)
class Row:
    """What one type can do; a capability is `yes` or the reason why not."""

    model_type: str
    verdict: str
    difference: str
    gradient: str
    train: str
    lora: str
    reward: str
    generate: str
    why: str

    @property
    def line(self) -> str:
        """The row of the table."""
        return "| " + " | ".join(text.replace("|", "/") for text in vars(self).values()) + " |"


def zoo_config(model_type: str) -> Any:
    """Return the small copy of a type's default configuration, for the tests' tokenizer."""
    full = CONFIG_MAPPING[model_type](**SETTINGS.get(model_type, {}))
    name = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type, "")
    if name.endswith("ForConditionalGeneration"):  # what such checkpoints are saved as
        full.architectures = [name]
    values = full.to_dict()
    heads = values.get("num_attention_heads")
    for name, value in (("num_key_value_heads", heads), ("head_dim", 64)):
        if heads and name in values and values[name] is None:
            setattr(full, name, value)
    small = small_config(full)
    text = small.get_text_config()
    for config in {id(small): small, id(text): text}.values():
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
        for name in ("vocab_size", "vocab_size_per_layer_input"):
            if name in config.to_dict():
                setattr(config, name, 328)  # some families add a token of their own
    return small


def tried(work: Callable[[], str]) -> str:
    """Return what `work` does, or its refusal; what is no ValueError is told as an error."""
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            return work()
    except ValueError as error:
        return f"refused: {short(str(error))}"
    except Exception as error:
        return f"ERROR {type(error).__name__}: {str(error).splitlines()[:1]}"


def short(reason: str) -> str:
    """Return a reason in the few words that fit a cell."""
    for long, brief in WORDS:
        reason = re.sub(long, brief, reason)
    return shorten(reason, 100, placeholder=" ...")


def run_row(model_type: str, folder: Path) -> Row:
    """Build a type small and take it through everything."""
    logging.set_verbosity_error()

    def build() -> tuple[Any, Verdict]:
        config = zoo_config(model_type)
        return config, verdict(config, reward=False)

    try:
        config, verdict_of = build()
    except Exception as error:  # of a configuration's own code
        return Row(model_type, "not built", *("",) * 6, short(" ".join(str(error).split())))
    why = verdict_of.packed if verdict_of.kind == "padded" else verdict_of.padded
    if verdict_of.kind == "refused":
        return Row(model_type, "refused", *("",) * 6, short(why))
    folder.mkdir()
    fill(folder)
    shutil.rmtree(folder / "llama")
    torch.manual_seed(0)
    saved = tried(lambda: save_small(config, folder / "llama"))
    capabilities = [saved] * 4
    if saved == YES:
        capabilities = [tried(lambda w=work: w(folder)) for work in (sft, lora, reward, generate)]
    return Row(
        model_type,
        verdict_of.kind,
        f"{verdict_of.difference:.0e}",
        f"{verdict_of.gradient:.0e}",
        *capabilities,
        "" if verdict_of.kind == "packed" else short(why),
    )


def save_small(config: Any, folder: Path) -> str:
    """Write a random model and the tests' tokenizer."""
    model = auto_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():  # a choice of keys by near-equal scores would hang on rounding
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return YES


def finite(metrics: dict[str, Any], name: str) -> float:
    """Return a metric that must be a finite number."""
    value = float(metrics[name])
    assert math.isfinite(value), f"{name} is {value}"
    return value


def first_metrics(folder: Path) -> dict[str, Any]:
    """Return the metrics of a run's first step."""
    found: dict[str, Any] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    return found


def sft(folder: Path) -> str:
    """Fine-tune for two steps."""
    train_sft(sft_config(folder, "sft", max_steps=2))
    finite(first_metrics(folder / "sft"), "loss")
    return YES


def lora(folder: Path) -> str:
    """Take a step of DPO under an adapter: its first loss is log 2."""
    config = dpo_config(folder, "lora", max_steps=1)
    model = replace(config.model, lora=LoraConfig(rank=2))
    train_dpo(replace(config, model=model))
    loss = finite(first_metrics(folder / "lora"), "loss")
    return YES if abs(loss - math.log(2)) < 1e-3 else f"first loss of DPO {loss:.4f}"


def reward(folder: Path) -> str:
    """Train a reward model for a step."""
    train_reward(reward_config(folder, "reward", max_steps=1))
    finite(first_metrics(folder / "reward"), "loss")
    return YES


def generate(folder: Path) -> str:
    """Sample prompts of several lengths: the sampler's log-probs are the trainer's."""
    path = str(folder / "llama")
    compute = Compute(packing=choose_packing("auto", [path]))
    model = load_policy(path, compute)
    sampler = TransformersSampler(model, eos_token_ids=[2], pad_token_id=0)
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16]]
    drawn = sampler.generate(prompts, SamplingParams(max_new_tokens=9), seed=0)
    groups = [
        Group(ids, [answer.token_ids for answer in answers])
        for ids, answers in zip(prompts, drawn, strict=True)
    ]
    with torch.no_grad():
        ours = response_logprob(model, pack(groups), compute)
    theirs = torch.tensor([x for answers in drawn for answer in answers for x in answer.logprobs])
    difference = float((ours - theirs).abs().max())
    return YES if difference < 1e-3 else f"log-probs differ by {difference:.1g}"
