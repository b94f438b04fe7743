"""A pretrained model, SmolLM2-135M-Instruct: log-probs, an answer, and first steps of DPO.

`./scripts/test.sh` fetches it into the user's cache folder.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastalign.batch.packed import Group, pack
from fastalign.cli.main import main
from fastalign.compute import Compute
from fastalign.data.tokenizer import eos_token_ids, load_tokenizer
from fastalign.models.forward import response_logprob
from fastalign.models.load import load_policy
from fastalign.rollouts import SamplingParams, TransformersSampler
from fastalign.written_files import cache_folder
from tests.small_runs import read_metrics, write_rows

MODEL = cache_folder("models") / "SmolLM2-135M-Instruct"
pytestmark = pytest.mark.skipif(
    not (MODEL / "config.json").is_file(),
    reason=f"no {MODEL.name} in the cache folder: python scripts/fetch_sample_model.py",
)
QUESTION = "What is the capital of France?"
ANSWERS = ("The capital of France is Paris.", "I would rather talk about 1789, or cheese.")


def prompt_ids(tokenizer: Any) -> list[int]:
    message = [{"role": "user", "content": QUESTION}]
    ids: list[int] = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_dict=False
    )
    return ids


@pytest.fixture(scope="module")
def policy() -> Any:
    return load_policy(MODEL)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(str(MODEL))


def test_packed_logprobs_are_those_of_transformers(policy: Any, tokenizer: Any) -> None:
    prompt = prompt_ids(tokenizer)
    answers = [tokenizer(text)["input_ids"] for text in ANSWERS]
    other = tokenizer("Meetings end", add_special_tokens=False)["input_ids"]
    groups = [Group(prompt, answers), Group(other, [answers[1]])]
    plain = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="eager")
    expected = []
    with torch.no_grad():
        actual = response_logprob(policy, pack(groups), Compute())
        for group in groups:
            for answer in group.response_ids:
                ids = torch.tensor([[*group.prompt_ids, *answer]])
                logprob = plain(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
                expected.append(logprob[len(group.prompt_ids) - 1 :, 0])
    torch.testing.assert_close(actual, torch.cat(expected), rtol=0, atol=1e-4)
    # a pretrained model: it expects the right answer, a random one has 10.8 nats a token
    assert expected[0].mean() > -0.5


def test_the_likeliest_answer_is_the_right_one(policy: Any, tokenizer: Any) -> None:
    ends = eos_token_ids(tokenizer, MODEL)
    sampler = TransformersSampler(policy, eos_token_ids=ends, pad_token_id=ends[0])
    params = SamplingParams(max_new_tokens=16, temperature=0)
    [[completion]] = sampler.generate([prompt_ids(tokenizer)], params, seed=0)
    assert completion.finish_reason == "stop"
    assert tokenizer.decode(completion.token_ids, skip_special_tokens=True) == ANSWERS[0]


def test_dpo_under_an_adapter_begins_at_log_2_and_falls(tmp_path: Path) -> None:
    right, wrong = ([{"role": "assistant", "content": text}] for text in ANSWERS)
    prompt = [{"role": "user", "content": QUESTION}]
    row = {"prompt": prompt, "chosen": wrong, "rejected": right}
    pairs = write_rows(tmp_path / "pairs.jsonl", [row])
    run = ["dpo", "--model.path", str(MODEL), "--data.train", str(pairs), "--train.max-steps", "3"]
    adapter = ["--model.lora.rank", "4", "--model.lora.no-save-merged", "--optim.lr", "1e-3"]
    folder = ["--run.dir", str(tmp_path / "run"), "--reference.cache-dir", str(tmp_path)]
    assert (
        main([*run, *adapter, *folder, "--optim.warmup-steps", "0", "--train.device", "cpu"]) == 0
    )
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[2] < losses[1] < losses[0] - 0.01
