# ruff: noqa: F401
"""What every rank would import, imported once by the process that ranks are forked from."""

import gc

import sentencepiece
import torch.profiler
import torch.utils.tensorboard
import transformers.models.llama.modeling_llama
import typeguard

import fastalign.cli.main
import fastalign.trainers
import tests.small_runs

gc.freeze()  # a rank's collections need not look at all of that again
