"""`samples.jsonl`: what was sampled while a run trained, with rewards; nothing twice or lost."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastalign.data.tokenizer import load_tokenizer
from fastalign.evaluation.rewards import BagOfWordsReward
from fastalign.ranks.errors import UserCodeFailed
from fastalign.runs.metrics import LinesFile
from fastalign.trainers import ADVANTAGES, train_online_dpo, train_ppo
from fastalign.trainers.sampling.config import SamplesConfig
from tests import small_runs
from tests.small_runs import (
    WORDS,
    ppo_config,
    read_metrics,
    scored_by_answers,
    shared_letters,
    words_reward,
    write_rows,
)
from tests.trainers.online_dpo.test_online_dpo import online_config, vowels


def read_samples(run: Path) -> list[dict[str, Any]]:
    lines = (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def places(rows: list[dict[str, Any]], *, held_out: bool) -> list[int]:
    """The step of each row."""
    return [row["step"] for row in rows if row["held_out"] == held_out]


def test_the_rows_are_what_was_sampled_with_each_reward_and_the_rows_columns(folder: Path) -> None:
    config = scored_by_answers(ppo_config(folder, "run", max_steps=5, eval_every=3))
    sources = (*config.reward.sources, words_reward(folder))
    config = replace(
        config,
        reward=replace(config.reward, sources=sources, weights=(2.0, 0.5), normalise=True),
        samples=SamplesConfig(every=2, num_completions=3),
    )
    assert train_ppo(config).finished
    rows = read_samples(folder / "run")
    assert places(rows, held_out=False) == [1, 1, 1, 2, 2, 2, 4, 4, 4, 5, 5, 5]
    assert places(rows, held_out=True) == [3, 3, 3, 5, 5, 5]
    tokenizer, words = load_tokenizer(folder / "llama"), BagOfWordsReward(words_reward(folder))
    for row in rows:
        prompt, text = row["prompt"], row["completion"]
        assert row["answer"] == prompt.removeprefix("The ") + "!"
        parts = {
            "tests.small_runs:shared_letters": shared_letters([text], [row["answer"]])[0],
            "words": words.score(prompt + text),
        }
        assert row["rewards"] == pytest.approx(parts)
        assert row["reward"] == pytest.approx(
            2.0 * row["rewards"][next(iter(parts))] + 0.5 * parts["words"]
        )
        assert row["num_prompt_tokens"] == len(tokenizer(prompt)["input_ids"])
        ended = row["finish_reason"] == "stop"
        assert 0 < row["num_completion_tokens"] <= 5
        assert ended or row["num_completion_tokens"] == 5
    # Two samples of a prompt, then the next prompt; one of each held-out prompt, in their order.
    assert rows[0]["prompt"] == rows[1]["prompt"] != rows[2]["prompt"]
    held_out = [row["prompt"] for row in rows if row["held_out"]]
    assert held_out == [f"The {word}" for word in WORDS[:3]] * 2


def test_all_completions_of_a_step_average_to_its_logged_reward(folder: Path) -> None:
    config = ppo_config(folder, "run", max_steps=3)
    config = replace(config, samples=SamplesConfig(every=1, num_completions=1000))
    assert train_ppo(config).finished
    rows, metrics = read_samples(folder / "run"), read_metrics(folder / "run")
    for logged in metrics:
        rewards = [r["reward"] for r in rows if r["step"] == logged["step"] and not r["held_out"]]
        assert len(rewards) == 8
        assert sum(rewards) / 8 == pytest.approx(logged["reward"])
        assert all("rewards" not in row for row in rows)  # of one source
    held_out = [row["reward"] for row in rows if row["held_out"]]
    assert sum(held_out) / len(WORDS) == pytest.approx(metrics[-1]["eval_reward"])


def ppo_by(advantage: str) -> Callable[..., Any]:
    def make(folder: Path, run: str, **train: Any) -> Any:
        config = ppo_config(folder, run, **train)
        return replace(config, ppo=replace(config.ppo, advantage=ADVANTAGES[advantage]()))

    return make


@pytest.mark.parametrize(
    ("make", "train"),
    [(ppo_by("rloo"), train_ppo), (ppo_by("grpo"), train_ppo), (online_config, train_online_dpo)],
    ids=["rloo", "grpo", "online-dpo"],
)
def test_each_algorithm_that_samples_writes_the_first_and_the_last_step(
    make: Callable[..., Any], train: Callable[..., Any], folder: Path
) -> None:
    assert train(make(folder, "run", max_steps=4)).finished
    rows = read_samples(folder / "run")
    assert sorted(set(places(rows, held_out=False))) == [1, 4]
    if train is train_online_dpo:
        assert [row["reward"] for row in rows] == pytest.approx(
            [vowels([""], [row["completion"]])[0] for row in rows]
        )


def test_text_in_any_script_is_readable_in_the_file(folder: Path) -> None:
    config = ppo_config(folder, "run", max_steps=1)
    prompts = write_rows(folder / "scripts.jsonl", [{"prompt": "Café 电池"}])
    data = replace(config.data, train=str(prompts), eval=None)
    reward = replace(config.reward, normalise=False)
    assert train_ppo(replace(config, data=data, reward=reward)).finished
    assert "Café 电池" in (folder / "run/samples.jsonl").read_text(encoding="utf-8")
    lines = LinesFile(folder / "lines.jsonl", None, 0)
    lines.hold([{"prompt": "half \ud83d of a pair"}])
    lines.require_written()
    lines.close()
    assert json.loads((folder / "lines.jsonl").read_bytes()) == {"prompt": "half \ud83d of a pair"}


def test_none_are_written_where_none_are_asked_for(folder: Path) -> None:
    config = replace(ppo_config(folder, "run", max_steps=2), samples=SamplesConfig(every=0))
    train_ppo(config)
    assert not (folder / "run/samples.jsonl").exists()


def test_a_run_that_ended_by_an_error_goes_on_with_no_row_twice_or_lost(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def fails_at_the_fifth_call(completions: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise ConnectionError("no answer")
        return [float(len(text)) for text in completions]

    def config(run: str, **train: Any) -> Any:
        config = ppo_config(folder, run, max_steps=6, **train)
        sources = ("tests.small_runs:shared_letters",)
        reward = replace(config.reward, sources=sources, normalise=False)
        data = replace(config.data, eval=None)
        return replace(config, data=data, reward=reward, samples=SamplesConfig(every=1))

    monkeypatch.setattr(small_runs, "shared_letters", fails_at_the_fifth_call)
    calls = 5
    train_ppo(config("straight"))
    calls = 0
    with pytest.raises(UserCodeFailed, match="no answer"):
        train_ppo(config("run"))
    rows = read_samples(folder / "run")
    assert sorted(set(places(rows, held_out=False))) == [1, 2, 3, 4]
    # As if the process had logged more, and was killed before it saved that.
    with (folder / "run/samples.jsonl").open("a") as file:
        file.write('{"step": 5, "completion": "of a process that was killed')
    train_ppo(config("run", resume=True))
    files = [folder / run / "samples.jsonl" for run in ("straight", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_rows_stay_when_samples_are_switched_off_and_on_again(folder: Path) -> None:
    config = ppo_config(folder, "run")
    for step, every in ((3, 1), (5, 0), (8, 1)):
        train = replace(config.train, stop_at_step=step)
        run = replace(config.run, resume=step > 3)
        train_ppo(replace(config, train=train, run=run, samples=SamplesConfig(every=every)))
    found = sorted(set(places(read_samples(folder / "run"), held_out=False)))
    assert found == [1, 2, 3, 6, 7, 8]


def test_a_file_that_the_run_did_not_write_stays(folder: Path) -> None:
    config = ppo_config(folder, "run")
    off = replace(config, samples=SamplesConfig(every=0))
    train_ppo(replace(off, train=replace(off.train, stop_at_step=2)))
    (folder / "run/samples.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match=r"samples\.jsonl: expected no such file.*up to step 2"):
        train_ppo(replace(config, run=replace(config.run, resume=True)))
    assert (folder / "run/samples.jsonl").read_text() == "mine\n"
    (folder / "other").mkdir()
    (folder / "other/samples.jsonl").write_text("mine\n")
    with pytest.raises(ValueError, match=r"samples\.jsonl exists, and no run of fastalign made it"):
        train_ppo(ppo_config(folder, "other"))
    assert (folder / "other/samples.jsonl").read_text() == "mine\n"


def test_a_run_that_never_saved_begins_again_and_its_rows_are_moved(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ppo_config(folder, "run", max_steps=2)
    train_ppo(config)
    first = (folder / "run/samples.jsonl").read_bytes()
    for name in ("model", "value", "checkpoints"):
        (folder / "run" / name).rename(folder / name)
    train_ppo(config)
    assert "its metrics are moved to metrics.jsonl.1" in capsys.readouterr().out
    assert (folder / "run/samples.jsonl.1").read_bytes() == first
    assert (folder / "run/samples.jsonl").read_bytes() == first
