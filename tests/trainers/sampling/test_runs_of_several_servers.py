"""Runs on several servers of which some are killed: they end as if all had lived.

The servers are stand-ins in processes of their own; `test_vllm_runs.py` has vLLM's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastalign.models.load import save_model
from fastalign.rollouts import SamplerFailed
from fastalign.trainers import PPOConfig, Truncated, train_ppo
from tests.ranks.test_ranks import lora
from tests.rollouts.stand_in_server import TOKEN, StandInProcess
from tests.rollouts.vllm_cases import OPTIONS, make_policy
from tests.runs.test_resume import numbers
from tests.small_runs import ppo_config, read_metrics
from tests.tokenizers import make_tokenizer

RUNS = ("straight", "killed")
LOST = "sampling/num_lost_servers"
OF_SERVERS = ("sampling/num_servers", LOST)


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTALIGN_VLLM_TOKEN", TOKEN)


@contextmanager
def servers(*moments: tuple[str, int] | None) -> Iterator[list[StandInProcess]]:
    """One for each moment at which it is to be killed."""
    config = make_policy().config
    with ExitStack() as stack:
        found = [StandInProcess(config, moment) for moment in moments]
        for server in found:
            stack.callback(server.kill)
        yield found


def served_config(
    folder: Path, run: str, found: Sequence[StandInProcess], **train: Any
) -> PPOConfig:
    save_model(make_policy(), make_tokenizer(), folder / "llama")
    config = ppo_config(folder, run, **({"max_steps": 4} | train))
    options = replace(OPTIONS, url=tuple(server.url for server in found), silence_seconds=20)
    fewer = {  # completions, which take these servers long
        "reward": replace(config.reward, normalise=False),
        "data": replace(config.data, eval=None),
    }
    return replace(config, sampler="vllm-server", vllm=options, **fewer)


def overlapped(config: PPOConfig) -> PPOConfig:
    ppo = replace(config.ppo, importance=Truncated())
    return replace(config, ppo=ppo, vllm=replace(config.vllm, overlap=True))


def without_servers(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in OF_SERVERS} for row in numbers(folder)]


@pytest.mark.parametrize(
    ("change", "in_a_sync"),
    [(lambda config: config, "load"), (overlapped, "load"), (lora, "adapted")],
    ids=["whole", "overlap", "adapter"],
)
def test_a_run_whose_servers_are_killed_ends_with_the_bits_of_one_whose_servers_live(
    folder: Path,
    change: Callable[[PPOConfig], PPOConfig],
    in_a_sync: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One is killed among its completions of a step, one in a sync; the run is resumed without."""
    with servers(("completion", 4), (in_a_sync, 3), None) as found:
        train_ppo(change(served_config(folder, "straight", found[2:])))
        capsys.readouterr()
        train_ppo(change(served_config(folder, "killed", found, stop_at_step=3)))
        said = [line for line in capsys.readouterr().out.splitlines() if "it is left out" in line]
        for server, left, line in zip(found, (2, 1), said, strict=False):
            server.process.join(20)
            assert server.process.exitcode == -9
            assert f"the server at {server.url} is gone or silent" in line
            assert line.endswith(f"by the others ({left} of 3 servers are left)")
        assert len(said) == 2
        rows = read_metrics(folder / "killed")
        assert [row["sampling/num_servers"] for row in rows][-1] == 1
        assert sum(row[LOST] for row in rows) == 2
        assert sum(row["sampling/num_rebuilds"] for row in rows) == 0
        train_ppo(change(served_config(folder, "killed", found[2:], resume=True)))
    assert without_servers(folder / "killed") == without_servers(folder / "straight")
    first, second = (load_file(folder / run / "model/model.safetensors") for run in RUNS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_whose_servers_are_all_killed_is_saved(folder: Path) -> None:
    with servers(("completion", 14), ("completion", 14)) as found:
        config = served_config(folder, "killed", found)
        config = replace(config, vllm=replace(config.vllm, start_seconds=0.5))
        no_server = r"no vLLM server at .* in 0\.5 seconds .*\nstep \d is saved, go on with"
        with pytest.raises(SamplerFailed, match=no_server):
            train_ppo(config)
        assert 1 <= len(read_metrics(folder / "killed")) < 4
