# ruff: noqa: E402, F401
"""What every rank would import, imported once by the process that ranks are forked from."""

import gc

gc.disable()  # all of it is kept
from importlib import import_module
from importlib.util import find_spec
from pkgutil import walk_packages

import sentencepiece
import torch.profiler
import torch.utils.tensorboard
import transformers.models.llama.modeling_llama
import typeguard
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import fastalign.cli.main
import fastalign.ops
import fastalign.trainers.online_dpo.train
import fastalign.trainers.ppo.train
import fastalign.trainers.reward.train
import fastalign.trainers.sft
import tests.small_runs
from fastalign.cli.algorithms import ALGORITHMS

# A run imports these when something first asks for them: rows (PyArrow's arrays import pandas),
# the optimiser, a profile, an adapter, several ranks, 8-bit states.
LATER = (
    *("pyarrow.compute", "pyarrow.ipc", "pandas", "cloudpickle", "pydoc", "_strptime"),
    *("numpy.ctypeslib", "numpy.ma", "encodings.idna"),
    *("torch.distributed.fsdp", "torch.utils.serialization.config"),
    *("bitsandbytes", "peft", "peft.functional", "peft.tuners.lora.bnb"),
    "peft.utils.transformers_weight_conversion",
)
OPERATIONS = [
    module.name
    for module in walk_packages(fastalign.ops.__path__, "fastalign.ops.")
    if module.name.endswith(".native")
]
for name in (*LATER, *OPERATIONS):
    if find_spec(name.partition(".")[0]) is not None:
        import_module(name)
# Hundreds of patterns, and the docstrings of each setting, are read once a process.
get_checkpoint_conversion_mapping("llama")
RUN = ["--model.path", "m", "--data.train", "d", "--run.dir", "r"]
for algorithm in ALGORITHMS.values():
    algorithm.parse([*RUN, *(["--reward.sources", "s"] if algorithm.samples else [])])
gc.freeze()  # a rank's collections need not look at all of that again
gc.enable()
