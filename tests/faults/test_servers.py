"""Servers of vLLM: one that loads nothing, or something else, and one that asks for a token."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from tests.faults.real import Stage
from tests.faults.table import ALONE, Place, fault
from tests.rollouts.stand_in_server import TOKEN, Worker, stand_in_server


class Elsewhere(Worker):
    """A worker in a container with a /dev/shm of its own."""

    def fastalign_load(self, folder: str, version: str) -> str:
        return super().fastalign_load(f"/proc/self{folder}", version)


class Deaf(Worker):
    """A worker that acknowledges all and loads only what it is sent first."""

    def fastalign_load(self, folder: str, version: str) -> str:
        self.first = getattr(self, "first", None) or super().fastalign_load(folder, version)
        return self.first


@pytest.fixture
def model(stage: Stage) -> AutoConfig:
    return AutoConfig.from_pretrained(stage.folder / "llama")


def flags(url: str, folder: Path, token: str = TOKEN) -> list[str]:
    file = folder / "token"
    file.write_text(token)
    file.chmod(0o600)
    return ["--sampler", "vllm-server", "--vllm.url", url, "--vllm.token-file", str(file)]


@fault(
    "a vLLM server that does not see the weights that are written for it (a container with its own "
    "/dev/shm)",
    ALONE,
    does="`vllm.sync_folder: the server at http://... read 0 tensors or files in ... (hash none), "
    "expected the ... written there (...): it sees another folder; name one that both see "
    "(--vllm.sync-folder), or use --vllm.transport network`, exit code 2 before the first step",
)
def test_another_folder(stage: Stage, run: str, model: AutoConfig, place: Place) -> None:
    with stand_in_server(model, Elsewhere) as (url, _):
        done = stage.run(place, run, *flags(url, stage.folder), trainer="ppo")
    assert done.codes == [2]


@fault(
    "a vLLM server that acknowledges a sync and keeps the weights that it has",
    ALONE,
    does="`it sees another folder; name one that both see`, exit code 2 at that sync: it answers "
    "with the hash of what it loaded; no step is trained on samples of other weights",
)
def test_an_acknowledgement_alone(stage: Stage, run: str, model: AutoConfig, place: Place) -> None:
    with stand_in_server(model, Deaf) as (url, _):
        done = stage.run(place, run, *flags(url, stage.folder), trainer="ppo")
    assert done.codes == [2]
    lines = (done.folder / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 1  # of the weights that it has
    assert json.loads(lines[0])["step"] == 1


@fault(
    "a vLLM server with another token than the run's",
    ALONE,
    does="`vllm.url: the server at http://... refuses this token; expected its own in "
    "FASTALIGN_VLLM_TOKEN, or in the file that ...fastalign vllm-server... names "
    "(--vllm.token-file)`, exit code 2",
)
def test_another_token(stage: Stage, run: str, model: AutoConfig, place: Place) -> None:
    with stand_in_server(model) as (url, worker):
        done = stage.run(place, run, *flags(url, stage.folder, "wrong"), trainer="ppo")
    assert done.codes == [2]
    assert worker._fastalign_version == ""
