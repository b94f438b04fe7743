"""The cache of reference log-probs: what it is keyed by, checked by, and survives."""

import fcntl
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastalign.data.tokenizer import load_tokenizer
from fastalign.models.load import load_policy, save_model
from fastalign.runs.config import TrainConfig
from fastalign.runs.inputs import load_data
from fastalign.runs.open import make_compute
from fastalign.trainers import LOSSES, train_dpo
from fastalign.trainers.dpo import reference
from fastalign.trainers.dpo.reference import digest_of, merge_into_cache, read_cache
from tests import rank_processes as ranks
from tests.small_runs import dpo_config, prepared_pairs, read_metrics, write_rows
from tests.tiny import tiny_model
from tests.tokenizers import CHATML, WITHOUT_END, make_tokenizer


def cache_files(folder: Path) -> list[Path]:
    return sorted((folder / "reference").glob("*.safetensors"))


def logprobs(folder: Path, used: Any = range(12), **train: Any) -> Tensor:
    """The reference log-probs of the fixture's pairs, through the cache."""
    config = dpo_config(folder, "unused")
    compute = make_compute(TrainConfig(device="cpu", **train))
    model = load_policy(folder / "llama", compute)
    tokenizer = load_tokenizer(folder / "llama")
    data = load_data(config, config.data.train, tokenizer)
    values = prepared_pairs(config, model, tokenizer, data, used, compute).reference
    assert values is not None
    return values


def test_a_second_run_computes_none_and_checks_a_few(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_dpo(dpo_config(folder, "first", max_steps=2))
    assert "0 cached, 8 to compute\n" in capsys.readouterr().out
    train_dpo(dpo_config(folder, "second", max_steps=2))
    out = capsys.readouterr().out
    assert "8 cached, 0 to compute; 4 of the cached ones were computed again and agree\n" in out
    assert read_metrics(folder / "first")[1]["loss"] == read_metrics(folder / "second")[1]["loss"]


def test_another_loss_or_beta_uses_the_same_values(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logprobs(folder)
    for name, loss in (("beta", LOSSES["dpo"](beta=0.7)), ("type", LOSSES["ipo_mean"]())):
        capsys.readouterr()
        train_dpo(replace(dpo_config(folder, name, max_steps=3), loss=loss))
        assert "12 cached, 0 to compute" in capsys.readouterr().out
    assert len(cache_files(folder)) == 1


def test_new_weights_data_truncation_or_precision_are_another_file(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dpo_config(folder, "whole", max_steps=3)
    train_dpo(config)
    # A longer limit that cuts nothing is no change: the token ids are the same.
    train_dpo(replace(dpo_config(folder, "longer"), data=replace(config.data, max_length=2000)))
    assert len(cache_files(folder)) == 1
    data = replace(config.data, max_length=14, on_too_long="truncate")
    train_dpo(replace(dpo_config(folder, "cut", max_steps=3), data=data))
    assert " truncated" in capsys.readouterr().out
    assert len(cache_files(folder)) == 2
    train_dpo(dpo_config(folder, "bf16", max_steps=3, precision="bf16"))
    assert len(cache_files(folder)) == 3
    model = load_policy(folder / "llama")
    with torch.no_grad():
        model.model.norm.weight[3] *= 1.001
    save_model(model, make_tokenizer(), folder / "llama")
    train_dpo(dpo_config(folder, "weights", max_steps=3))
    assert len(cache_files(folder)) == 4
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    (folder / "pairs.jsonl").write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    train_dpo(dpo_config(folder, "order", max_steps=3))
    assert len(cache_files(folder)) == 5


def test_another_tokenizer_or_chat_template_is_another_file(folder: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"The menu {word}"}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
        for word in ("dim", "slow", "good")
    ]
    write_rows(folder / "pairs.jsonl", rows)
    model = tiny_model("llama", vocab_size=320)
    found = []
    for number, options in enumerate(
        (
            {"chat_template": CHATML},
            {"chat_template": WITHOUT_END},
            {"chat_template": WITHOUT_END, "prefix_space": True},
        )
    ):
        save_model(model, make_tokenizer(**options), folder / "llama")  # type: ignore[arg-type]
        found.append(logprobs(folder, range(3)))
        assert len(cache_files(folder)) == number + 1
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_another_packing_is_within_rounding_and_reuses_the_values(
    folder: Path, precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = logprobs(folder, packing="shared_prefix", precision=precision)
    for packing in ("packed", "padded"):
        again = logprobs(folder, packing=packing, precision=precision, tokens_per_batch=40)
        assert "12 cached, 0 to compute" in capsys.readouterr().out
        assert torch.equal(first, again)


def overwrite(file: Path, values: Tensor) -> None:
    save_file({"logprob": values}, file, metadata={"sha256": digest_of(values)})


@pytest.mark.parametrize(("precision", "shift"), [("float32", 0.02), ("bf16", 2.0)])
@pytest.mark.parametrize("where", [(0, 1), (11, 0), "inner"])
def test_a_value_that_is_not_the_references_is_refused(
    folder: Path, precision: str, shift: float, where: Any
) -> None:
    values = logprobs(folder, precision=precision)
    (file,) = cache_files(folder)
    wrong = values.clone()
    if where == "inner":  # two of the ten are drawn by the file's name; wrong ones everywhere
        wrong[1:11] -= shift
    else:
        wrong[where] += shift
    overwrite(file, wrong)
    expected = rf"{file.name}: the reference log-prob of pair \d+ .*delete the file"
    with pytest.raises(ValueError, match=expected):
        logprobs(folder, precision=precision)
    # Without the wrong pairs nothing is wrong.
    if where == (0, 1):
        logprobs(folder, range(1, 12), precision=precision)


def damaged(content: bytes, how: str) -> bytes:
    if how == "flip":
        return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    if how == "truncate":
        return content[:-5]
    return b"" if how == "empty" else b"not a file of tensors at all"


@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "other", "shape"])
def test_a_damaged_file_is_put_aside_and_computed_again(
    folder: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = logprobs(folder)
    (file,) = cache_files(folder)
    if how == "shape":
        overwrite(file, values[:5])
    else:
        file.write_bytes(damaged(file.read_bytes(), how))
    content = file.read_bytes()
    capsys.readouterr()
    assert torch.equal(logprobs(folder), values)
    out = capsys.readouterr().out
    assert f"{file}: damaged cache of reference log-probs (" in out
    assert "0 cached, 12 to compute" in out
    assert file.with_name(f"{file.name}.damaged").read_bytes() == content
    assert torch.equal(load_file(file)["logprob"], values)


def test_a_place_that_cannot_be_written_stops_no_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "file").write_text("")
    config = dpo_config(folder, "run", max_steps=2)
    config = replace(config, reference=replace(config.reference, cache_dir=str(folder / "file")))
    assert train_dpo(config).finished
    out = capsys.readouterr().out
    assert out.count("reference log-probs are not kept for later runs: ") == 2  # train and eval
    assert str(folder / "file") in out


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writing more than this raises OSError half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file_and_no_half_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_a_full_disk(path: Path, values: Tensor) -> Tensor:
        with largest_file(100):
            return merge_into_cache(path, values)

    values = logprobs(folder, range(6))
    (file,) = cache_files(folder)
    content = file.read_bytes()
    monkeypatch.setattr(reference, "merge_into_cache", on_a_full_disk)
    more = logprobs(folder)
    assert torch.equal(more[:6], values[:6])
    assert bool(more.isfinite().all())
    assert file.read_bytes() == content
    assert {path.name for path in file.parent.iterdir()} == {file.name, ".lock"}


def test_the_first_value_written_stays(tmp_path: Path) -> None:
    file = tmp_path / "values.safetensors"
    first = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan], [5.0, 6.0]])
    second = torch.tensor([[1.5, 2.5], [3.0, 4.0], [torch.nan, torch.nan]])
    assert torch.equal(merge_into_cache(file, first).nan_to_num(9), first.nan_to_num(9))
    merged = merge_into_cache(file, second)
    assert merged.tolist() == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    found, fault = read_cache(file, 3)
    assert fault is None
    assert torch.equal(found, merged)


def test_a_writer_waits_for_another_and_then_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "values.safetensors"
    asked = threading.Event()
    plain = fcntl.flock

    def flock(descriptor: Any, operation: int) -> None:
        asked.set()
        plain(descriptor, operation)

    merged: list[Tensor] = []
    ours = torch.tensor([[1.0, 2.0], [torch.nan, torch.nan]])
    writer = threading.Thread(target=lambda: merged.append(merge_into_cache(file, ours)))
    with (tmp_path / ".lock").open("w") as lock:
        plain(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(fcntl, "flock", flock)
        writer.start()
        assert asked.wait(30)
        overwrite(file, torch.tensor([[torch.nan, torch.nan], [3.0, 4.0]]))
    writer.join(30)
    assert merged[0].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_two_processes_at_once_lose_nothing_of_each_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = reference.compute_logprobs

    def meanwhile(*arguments: Any) -> Tensor:
        # This process has read an empty cache; now another one begins, and ends first.
        ranks.run(1, folder / "logs", logprobs, folder, range(5, 12))
        return plain(*arguments)

    monkeypatch.setattr(reference, "compute_logprobs", meanwhile)
    found = logprobs(folder, range(7))
    assert "0 cached, 7 to compute" in capfd.readouterr().out
    (file,) = cache_files(folder)
    kept = load_file(file)["logprob"]
    assert bool(kept.isfinite().all())
    # What both computed is what the first writer wrote, for both.
    assert torch.equal(found, kept)
