"""Small models, data and configurations for the trainers' tests."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastalign.models.load import save_model
from fastalign.rollouts import SamplingParams
from fastalign.runs.config import (
    DataConfig,
    JSDLoss,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SFTLoss,
    TeacherConfig,
    TrainConfig,
)
from fastalign.trainers import (
    DPOConfig,
    KLInReward,
    PPOConfig,
    PPOSettings,
    PreferenceDataConfig,
    PromptDataConfig,
    ReferenceConfig,
    RewardConfig,
    RewardSourceConfig,
    SFTConfig,
)
from fastalign.trainers.dpo.reference import load_reference
from fastalign.trainers.dpo.train import Pairs, make_pairs
from fastalign.trainers.reward.config import RewardRaoKupperLoss
from tests.tiny import tiny_model
from tests.tokenizers import make_tokenizer

WORDS = [
    "battery",
    "camera",
    "screen",
    "menu",
    "phone",
    "life",
    "button",
    "slow",
    "dim",
    "good",
    "excellent",
    "best",
    "small",
]


def sentence(number: int, length: int) -> str:
    return "".join(f" {WORDS[(number * 7 + i * (number + 3)) % len(WORDS)]}" for i in range(length))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fill(folder: Path) -> Path:
    """A tiny Llama with its tokenizer, pairs and texts, in an empty folder."""
    model = tiny_model("llama", vocab_size=320)
    save_model(model, make_tokenizer(), folder / "llama")
    pairs = [
        {
            "prompt": "The" + sentence(n, 1 + n % 3),
            "chosen": sentence(n + 20, 1 + n % 4),
            "rejected": sentence(n + 41, 2 + n % 3),
        }
        for n in range(12)
    ]
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(
        folder / "texts.jsonl", [{"text": "The" + sentence(n, 2 + n % 5)} for n in range(12)]
    )
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same; one thread, so that sums are repeatable."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fill(tmp_path)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


TRAIN = TrainConfig(max_steps=8, batch_size=4, device="cpu")
OPTIM = OptimConfig(lr=1e-3, warmup_steps=2, weight_decay=0.1)


def sft_config(folder: Path, run: str, **train: Any) -> SFTConfig:
    return SFTConfig(
        model=ModelConfig(path=str(folder / "llama")),
        data=DataConfig(train=str(folder / "texts.jsonl"), eval=str(folder / "texts.jsonl")),
        run=RunConfig(dir=str(folder / run), resume=train.pop("resume", False)),
        optim=OPTIM,
        train=replace(TRAIN, **train),
    )


def dpo_config(folder: Path, run: str, **train: Any) -> DPOConfig:
    return DPOConfig(
        model=ModelConfig(path=str(folder / "llama")),
        data=PreferenceDataConfig(
            train=str(folder / "pairs.jsonl"), eval=str(folder / "pairs.jsonl")
        ),
        run=RunConfig(dir=str(folder / run), resume=train.pop("resume", False)),
        reference=ReferenceConfig(cache_dir=str(folder / "reference")),
        optim=OPTIM,
        train=replace(TRAIN, **train),
    )


def reward_config(folder: Path, run: str, **train: Any) -> RewardConfig:
    """Every part of a checkpoint: a fresh head, ties, and a tie parameter that is learned."""
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    compared = [
        {
            "prompt": row["prompt"],
            "response_a": row["chosen"],
            "response_b": row["rejected"],
            "label": "tie" if number % 4 == 3 else "a",
        }
        for number, row in enumerate(rows)
    ]
    source = str(write_rows(folder / "compared.jsonl", compared))
    return RewardConfig(
        model=ModelConfig(path=str(folder / "llama")),
        data=PreferenceDataConfig(train=source, eval=source),
        run=RunConfig(dir=str(folder / run), resume=train.pop("resume", False)),
        loss=RewardRaoKupperLoss(nu_lr=0.05),
        optim=OPTIM,
        train=replace(TRAIN, **train),
    )


def prompts_file(folder: Path) -> str:
    rows = [{"prompt": f"The {word}", "completion": "unused"} for word in WORDS]
    return str(write_rows(folder / "prompts.jsonl", rows))


def words_reward(folder: Path) -> str:
    """A bag of words with the bias 0.5, in which word number n weighs n."""
    words = {word: float(place) for place, word in enumerate(WORDS)}
    (folder / "words.json").write_text(json.dumps({"bias": 0.5, "weights": words}))
    return str(folder / "words.json")


def shared_letters(completions: list[str], answer: list[str]) -> list[float]:
    pairs = zip(completions, answer, strict=True)
    return [float(len(set(text) & set(own))) for text, own in pairs]


def noisy(completions: list[str]) -> list[float]:
    """A reward that draws from torch's own generator, as a user's may."""
    return [
        len(text) + noise
        for text, noise in zip(completions, torch.rand(len(completions)).tolist(), strict=True)
    ]


def scored_with_noise(config: Any) -> Any:
    """The same, under a reward that no two calls give alike."""
    sources = ("tests.small_runs:noisy",)
    return replace(config, reward=replace(config.reward, sources=sources))


def scored_by_answers(config: Any) -> Any:
    """The same, of prompts with answers of their own, which the reward compares samples with."""
    rows = [{"prompt": f"The {word}", "answer": f"{word}!"} for word in WORDS]
    source = str(write_rows(Path(config.data.train).with_name("answers.jsonl"), rows))
    sources = ("tests.small_runs:shared_letters",)
    return replace(
        config,
        data=replace(config.data, train=source, eval=source),
        reward=replace(config.reward, sources=sources),
    )


def ppo_config(folder: Path, run: str, **train: Any) -> PPOConfig:
    """Every part of a checkpoint: a value model, an adapted coefficient, a scale of scores."""
    source = prompts_file(folder)
    return PPOConfig(
        model=ModelConfig(path=str(folder / "llama")),
        data=PromptDataConfig(train=source, eval=source),
        reward=RewardSourceConfig((words_reward(folder),), normalise=True, missing_eos_penalty=0.5),
        run=RunConfig(dir=str(folder / run), resume=train.pop("resume", False)),
        sampling=SamplingParams(max_new_tokens=5, num_samples=2),
        ppo=PPOSettings(epochs=2, mini_batches=2, ptx_data=str(folder / "texts.jsonl")),
        kl=KLInReward(target=1.0, horizon=100),
        optim=OPTIM,
        train=replace(TRAIN, **train),
    )


MakeConfig = Callable[..., Any]


def saved_tensors(checkpoint: Path, prefix: str = "") -> dict[str, Tensor]:
    """What the shards of a run of one process hold under a prefix, named without it."""
    shards = [load_file(path) for path in sorted(checkpoint.glob("*.safetensors"))]
    return {
        name.removeprefix(prefix): value
        for shard in shards
        for name, value in shard.items()
        if name.startswith(prefix)
    }


def learning_rate_scales(checkpoint: Path) -> list[float]:
    state = json.loads((checkpoint / "state.json").read_text())
    return sorted({group["lr_scale"] for group in state["optimizer"]["param_groups"]})


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def prepared_pairs(
    config: DPOConfig, policy: Any, tokenizer: Any, data: Any, used: Any, compute: Any
) -> Pairs:
    """Pairs with the reference's log-probs of those that are used, as a DPO run has them."""
    needed = config.loss.formula().needs_reference
    reference = load_reference(config, policy, tokenizer, compute) if needed else None
    return make_pairs(config, data, used, reference, compute)


def taught(config: SFTConfig) -> SFTConfig:
    """Return it with another model as its teacher, whose head has rows that are no tokens.

    The cross-entropy's divisor is not the divergence's.
    """
    teacher = Path(config.model.path).parent / "teacher"
    if not teacher.exists():
        save_model(tiny_model("llama", vocab_size=326, seed=1), make_tokenizer(), teacher)
    jsd = JSDLoss(weight=0.7, beta=0.3, temperature=1.5)
    loss = SFTLoss(jsd=jsd, class_weights=("</s>:3",))
    return replace(config, loss=loss, teacher=TeacherConfig(path=str(teacher)))
