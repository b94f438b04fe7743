"""One PPO step's pieces, for the tests of the trainer; and its losses in plain torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastalign.models.load import load_policy
from fastalign.models.reward import VALUE_HEAD
from fastalign.rollouts import Completion, SamplingParams
from fastalign.runs.config import TrainConfig
from fastalign.runs.open import make_compute
from fastalign.runs.state import TrainState, make_optimizer
from fastalign.trainers import Gae, PPOConfig
from fastalign.trainers.ppo import train as ppo
from fastalign.trainers.ppo.record import Experience
from fastalign.trainers.ppo.setup import PPOSetup, prepare_ppo
from fastalign.trainers.sampling.rollout import Rollouts, final_scores, roll_out
from tests.small_runs import ppo_config

INDICES = [3, 1, 4, 1, 5]


@dataclass
class FixedSampler:
    """Returns the same completions for every prompt, as if they had these log-probs."""

    answers: list[Completion]
    version: int = 0

    def metrics(self) -> dict[str, float]:
        return {}

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], params: SamplingParams, *, seed: int
    ) -> list[list[Completion]]:
        return [self.answers for _ in prompt_ids]

    def sync_weights(self, named_tensors: Any, version: int) -> None: ...

    def close(self) -> None: ...


def plain_config(folder: Path, **sections: Any) -> PPOConfig:
    """One mini-batch, no scale, no PTX, a fixed coefficient; `sections` are changed."""
    config = ppo_config(folder, "run")
    config = replace(
        config,
        reward=replace(config.reward, normalise=False, missing_eos_penalty=0.0),
        ppo=replace(config.ppo, ptx_data=None, epochs=1, mini_batches=1),
        kl=replace(config.kl, target=None, horizon=10000),
        sampling=replace(config.sampling, max_new_tokens=7),
    )
    changed = {
        name: replace(getattr(config, name), **section) if isinstance(section, dict) else section
        for name, section in sections.items()
    }
    return replace(config, **changed)


def make_run(config: PPOConfig, *, moved: bool = True, **train: Any) -> PPOSetup:
    """A run whose policy is no longer the reference, nor its value model zero, if `moved`."""
    train = {"device": "cpu", **train}
    compute = make_compute(TrainConfig(**train))
    run = prepare_ppo(replace(config, train=replace(config.train, **train)), compute)
    if moved:
        torch.manual_seed(1)
        for model in (run.models.policy, run.models.value):
            for parameter in [] if model is None else model.parameters():
                if parameter.requires_grad:
                    parameter.data.add_(0.02 * torch.randn_like(parameter))
        if run.models.value is not None:
            head_of(run.models.value).weight.data.normal_(std=0.2)
    return run


def head_of(value: Any) -> Any:
    """The head that values are read by, of a value model or on the policy itself."""
    return getattr(value, VALUE_HEAD) if hasattr(value, VALUE_HEAD) else value.score


def rollouts_of(run: PPOSetup, indices: Sequence[int] = INDICES) -> Rollouts:
    return roll_out(
        run.sampler,
        run.prompts,
        indices,
        run.config.sampling,
        run.tokenizer,
        run.sources,
        seed=3,
    )


def experience_of(run: PPOSetup, rollouts: Rollouts) -> tuple[Experience, dict[str, Any]]:
    score = final_scores(run.config.reward, rollouts.rewards, rollouts.ended, None)
    experience, counts = ppo.make_experience(run, rollouts, score, run.config.kl.coefficient)
    return experience, counts | ppo.measure_experience(run, experience)


def state_of(run: PPOSetup) -> TrainState:
    trained = run.models.trained
    return TrainState(trained, make_optimizer(trained, run.config.optim))


def eager_numbers(
    model: Any,
    value: Any,
    prompt: Sequence[int],
    response: Sequence[int],
    temperature: float,
    share: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs (n,), all log-probs (n, V), values (n,)) of one response by its own forward.

    Of the values' gradient a share reaches the layers.
    """
    ids = torch.tensor([[*prompt, *response]])
    places = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
    log_p = (model(ids).logits[0, places].double() / temperature).log_softmax(-1)
    logprob = log_p.gather(1, torch.tensor(response)[:, None])[:, 0]
    hidden = value.model(ids).last_hidden_state[0, places]
    hidden = hidden.detach() * (1 - share) + hidden * share
    return logprob, log_p, (hidden @ head_of(value).weight[0]).double()


def eager_gae(
    reward: Sequence[float], value: Sequence[float], gamma: float, gae_lambda: float
) -> tuple[list[float], list[float]]:
    """Advantages and returns of one response, from its last token backwards."""
    advantages: list[float] = []
    following, next_value = 0.0, 0.0
    for r, v in zip(reversed(reward), reversed(value), strict=True):
        following = r + gamma * next_value - v + gamma * gae_lambda * following
        next_value = v
        advantages.insert(0, following)
    return advantages, [a + v for a, v in zip(advantages, value, strict=True)]


def eager_loss(run: PPOSetup, rollouts: Rollouts, scores: Sequence[float]) -> Tensor:
    """The first update's whole loss (), by single forwards and the formulas as they are written."""
    config, models = run.config, run.models
    reference = load_policy(config.reference.path or config.model.path)
    rows = []
    flat = [(g.prompt_ids, ids) for g in rollouts.groups for ids in g.response_ids]
    for (prompt, ids), score in zip(flat, scores, strict=True):
        temperature = config.sampling.temperature
        logprob, log_p, value = eager_numbers(
            models.policy, models.value, prompt, ids, temperature, config.value.trunk_gradient
        )
        with torch.no_grad():
            of_reference = eager_numbers(reference, models.value, prompt, ids, temperature)
        x = logprob - of_reference[0]
        kl = {
            "k1": x,
            "k2": x.square() / 2,
            "k3": ((-x).exp() - 1 + x).clamp(max=10),
            "full": (log_p.exp() * (log_p - of_reference[1])).sum(-1),
        }[config.kl.estimator]
        weight = config.kl.coefficient if config.kl.in_reward else 0.0
        reward = (-weight * kl.detach()).tolist()
        reward[-1] += score
        assert isinstance(config.ppo.advantage, Gae)
        settings = (config.ppo.advantage.gamma, config.ppo.advantage.gae_lambda)
        advantage, returns = eager_gae(reward, value.tolist(), *settings)
        rows.append((logprob, value, kl, log_p, advantage, returns))
    logprob, value, kl, log_p = (torch.cat([row[i] for row in rows]) for i in range(4))
    advantage = torch.tensor([a for row in rows for a in row[4]], dtype=torch.float64)
    returns = torch.tensor([r for row in rows for r in row[5]], dtype=torch.float64)
    scale = 1.0
    assert isinstance(config.ppo.advantage, Gae)
    if config.ppo.advantage.whiten == "advantages":
        scale = 1 / advantage.std(correction=0).item()
        advantage = (advantage - advantage.mean()) * scale
    ratio = (logprob - logprob.detach()).exp()
    loss = -(ratio * advantage).mean()
    loss = loss + config.value.coefficient * (value - returns).square().mean() / 2
    entropy = -(log_p.exp() * log_p).sum(-1)
    loss = loss - config.ppo.entropy_coefficient * entropy.mean()
    if not config.kl.in_reward:
        loss = loss + config.kl.coefficient * kl.mean()
    elif config.kl.estimator == "full":  # the derivative of a state's own KL
        loss = loss + config.kl.coefficient * scale * kl.mean()
    return loss
