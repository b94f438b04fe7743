# ruff: noqa: E402, F401
"""What every rank would import, imported once by the process that ranks are forked from."""

import gc

gc.disable()  # all of it is kept
from importlib import import_module
from importlib.util import find_spec

import sentencepiece
import torch.profiler
import torch.utils.tensorboard
import transformers.models.llama.modeling_llama
import typeguard
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import fastalign.cli.main
import fastalign.trainers.online_dpo.train
import fastalign.trainers.ppo.train
import fastalign.trainers.reward.train
import fastalign.trainers.sft
import tests.small_runs

# A run imports these when an adapter, several ranks or 8-bit states first ask for them.
for name in ("torch.distributed.fsdp", "peft", "bitsandbytes"):
    if find_spec(name) is not None:
        import_module(name)
get_checkpoint_conversion_mapping("llama")  # compiles hundreds of patterns, once a process
gc.freeze()  # a rank's collections need not look at all of that again
gc.enable()
