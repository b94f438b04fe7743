"""Supervised fine-tuning: the cross-entropy of demonstrated responses."""

from pathlib import Path

import torch

from fastalign.data import load_sft, load_tokenizer
from fastalign.fused import sft_loss_fn
from fastalign.losses import segment_sum  # noqa: F401
from fastalign.models import load_policy
from fastalign.trainers.config import SFTConfig, config_to_dict
from fastalign.trainers.loop import RunResult, Task, run_loop
from fastalign.trainers.metrics import Metrics
from fastalign.trainers.run_folder import announce, locked, prepare_run_folder
from fastalign.trainers.state import seed_everything
from fastalign.trainers.step import Compute, Examples, accumulate, make_compute, measure_examples
