"""`--sampler`, as commands that sample take it: what vLLM drew is the model's, or one line."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from fastalign.cli.main import main
from fastalign.models.load import save_model
from fastalign.rollouts import (
    Completion,
    EngineSpec,
    SamplerFailed,
    SamplingParams,
    TransformersSampler,
    recompute_logprobs,
)
from fastalign.rollouts.engines import synced
from fastalign.rollouts.engines.server_process import TOKEN_VARIABLE
from tests.cli.test_commands import rows_of
from tests.rollouts.stand_in_server import TOKEN, stand_in_server
from tests.rollouts.vllm_cases import EOS, make_policy
from tests.small_runs import WORDS, write_rows
from tests.tokenizers import make_tokenizer

DATA = ["--data.prompts", "prompts.jsonl", "--sampling.num-samples", "3"]
SAMPLING = [*DATA, "--sampling.max-new-tokens", "12"]


def speaks_digits(seed: int) -> Any:
    """A policy that draws digits and ends: its texts are the same tokens when they are read again.

    The first entry of the residual stream is 4 at every place, and all other tokens are against it.
    """
    policy = make_policy(seed=seed)
    tokenizer = make_tokenizer()
    allowed = [*tokenizer.convert_tokens_to_ids(list("0123456789")), EOS]
    with torch.no_grad():
        policy.model.embed_tokens.weight[:, 0] = 4.0
        for layer in policy.model.layers:
            for product in (layer.self_attn.o_proj, layer.mlp.down_proj):
                product.weight[0] = 0.0
        policy.lm_head.weight[:, 0] = -1000.0
        policy.lm_head.weight[allowed, 0] = 0.0
        policy.lm_head.weight[allowed, 1:] *= 5.0
    return policy


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"The {word}"} for word in WORDS[:4]])
    (tmp_path / "longer.py").write_text(
        "def reward(prompts, completions):\n    return [len(text) for text in completions]\n"
    )
    for seed, name in enumerate(("one", "two")):
        save_model(speaks_digits(seed), make_tokenizer(), tmp_path / name)
    return tmp_path


def logprobs_of(policy: Any, rows: Sequence[dict[str, Any]]) -> list[float]:
    """What the policy itself says of each row's completion."""
    tokenizer, found = make_tokenizer(), []
    for row in rows:
        ids = tokenizer.encode(row["completion"], add_special_tokens=False)
        ids += [EOS] if row["finish_reason"] == "stop" else []
        logprobs = recompute_logprobs(
            policy, tokenizer.encode(row["prompt"]), ids, SamplingParams()
        )
        found.append(logprobs.double().sum().item())
    return found


def test_a_server_gives_reward_and_kl(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    models = ["--model.path", "one", "--reference.path", "two", "--reward", "longer:reward"]
    engine = ["--sampler", "vllm-server", "--vllm.url"]
    with stand_in_server(speaks_digits(0).config) as (url, _):
        assert main(["eval", *models, *SAMPLING, *engine, url, "--out", "out/eval.json"]) == 0
    result = json.loads((work / "out/eval.json").read_text())
    rows = rows_of(work / "out/samples.jsonl")
    ours, theirs = (logprobs_of(speaks_digits(seed), rows) for seed in (0, 1))
    assert [row["logprob"] for row in rows] == pytest.approx(ours, abs=1e-3)
    kl = sum(a - b for a, b in zip(ours, theirs, strict=True)) / len(rows)
    assert result["kl"] == pytest.approx(kl, abs=1e-3)
    assert result["reward"] == pytest.approx(sum(len(row["completion"]) for row in rows) / 12)
    assert result["config"]["sampler"] == "vllm-server"
    assert result["config"]["vllm"]["url"] == [url]


class Failing:
    """An engine that fails once, when three completions are done, and is a good one after it."""

    num_failures, num_open = 0, 0

    def __init__(self, spec: EngineSpec, *, on_progress: Callable[[int], None]):
        self._spec, self._on_progress = spec, on_progress
        self.version: int | None = None
        Failing.num_failures, Failing.num_open = 0, 1

    def sync_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        model = LlamaForCausalLM(self._spec.config).eval()
        model.load_state_dict(dict(named_tensors))
        self._sampler = TransformersSampler(
            model, eos_token_ids=[EOS], pad_token_id=0, rows_per_batch=1, on_progress=self._tell
        )
        self.version = version

    def _tell(self, count: int) -> None:
        self._on_progress(count)
        self._on_progress(0)

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> list[list[Completion]]:
        assert self._spec.limit == max(map(len, prompt_ids)) + params.max_new_tokens
        if Failing.num_failures == 0:
            Failing.num_failures = 1
            self._on_progress(3)
            raise SamplerFailed("sampler: the engine died")
        return self._sampler.generate(prompt_ids, params, seed=seed)

    def rebuild(self) -> None:
        self.version = None

    def metrics(self) -> dict[str, float | int]:
        return {}

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        Failing.num_open -= 1


@pytest.mark.parametrize("command", ["generate", "eval", "win-rate"])
def test_an_engine_that_dies_is_replaced_or_one_line_and_never_left_open(
    work: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(synced.ENGINES, "vllm", Failing)
    more = {
        "generate": [],
        "eval": ["--reference.path", "one"],
        "win-rate": ["--baseline.path", "one", "--reward", "longer:reward"],
    }
    typed = [command, "--model.path", "one", *more[command], *SAMPLING, "--sampler", "vllm"]
    assert main([*typed, "--vllm.num-rebuilds", "0", "--out", "failed.json"]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == f"fastalign {command}: sampler: the engine died"
    assert Failing.num_open == 0
    assert main([*typed, "--out", "done.json"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sample")]
    once = [
        "sampled 3 of 12",
        "sampler: the engine died; it is built anew and its work repeated",
        *(f"sampled {done} of 12" for done in (3, 6, 9, 12)),
    ]
    assert told == once * (2 if command == "win-rate" else 1)
    assert Failing.num_open == 0


def test_a_server_that_is_not_there_is_one_line(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = ["--vllm.url", "http://127.0.0.1:1", "--vllm.start-seconds", "0.2"]
    command = ["generate", "--model.path", "one", *SAMPLING, "--out", "s.jsonl"]
    assert main([*command, "--sampler", "vllm-server", *server]) == 2
    *bars, line = capsys.readouterr().err.splitlines()
    assert line.startswith("fastalign generate: sampler: no vLLM server at http://127.0.0.1:1 in ")
    assert not any("Traceback" in bar or "127.0.0.1" in bar for bar in bars)
    assert not (work / "s.jsonl").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--model.path", "m", "--data.prompts", "p"],
        ["eval", "--model.path", "m", "--reference.path", "r", "--data.prompts", "p"],
        ["win-rate", "--model.path", "m", "--baseline.path", "b", "--data.prompts", "p"],
        ["ppo", "--model.path", "m", "--data.train", "p", "--reward.sources", "b.json"],
    ],
)
def test_settings_of_vllm_without_it_are_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = "--run.dir" if arguments[0] == "ppo" else "--out"
    assert main([*arguments, out, str(tmp_path / "x"), "--vllm.eager"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    expected = "vllm.eager: True is a setting of vLLM; expected --sampler vllm or vllm-server"
    assert f"fastalign {arguments[0]}: {expected} with it, got transformers" in err
    assert main([*arguments, out, str(tmp_path / "x"), "--sampler", "vlm"]) == 2
    assert "vllm-server" in capsys.readouterr().err
    assert main([*arguments, out, str(tmp_path / "x"), "--sampler", "vllm-process"]) == 2
    gone = "sampler: vllm-process is gone; use vllm-server (started by the run) or vllm\n"
    assert capsys.readouterr().err == f"fastalign {arguments[0]}: {gone}"
