"""A policy that something random is left in is found before its first update."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalign.models import load
from fastalign.trainers import train_dpo, train_online_dpo, train_ppo
from tests.small_runs import dpo_config, ppo_config
from tests.trainers.online_dpo.test_online_dpo import online_config


@pytest.mark.parametrize(
    ("train", "make"),
    [(train_dpo, dpo_config), (train_ppo, ppo_config), (train_online_dpo, online_config)],
    ids=["dpo", "ppo", "online_dpo"],
)
def test_noise_in_a_model_ends_the_run(
    train: Any, make: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = load.disable_dropout

    def noisy(model: Any) -> None:
        quiet(model)
        model.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output + 0.1 * torch.randn_like(output)
        )

    monkeypatch.setattr(load, "disable_dropout", noisy)
    monkeypatch.setattr(load, "check_head", lambda model: None)
    config = make(folder, "run")
    with pytest.raises(ValueError, match="before the first step the policy is the reference"):
        train(replace(config, data=replace(config.data, eval=None)))
