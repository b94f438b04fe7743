"""Folders that somebody else made run no code of theirs, unless --model.trust-remote-code is given.

Each payload writes a file where it runs. What torch's restricted reader takes is taken.
"""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open

from fastalign.cli.main import main
from fastalign.data.conversation import Message
from fastalign.data.load import load_examples
from fastalign.data.tokenizer import chat_template, load_tokenizer
from fastalign.models.load import load_policy, load_reward_model, read_config, save_model
from fastalign.trainers import train_dpo, train_sft
from tests.small_runs import _one_thread, dpo_config, folder, sft_config, write_rows
from tests.tokenizers import make_tokenizer

__all__ = ["_one_thread", "folder"]


class Payload:
    """Unpickled, it makes a folder: by any reader that calls what a pickle names."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(folder: Path) -> Path:
    return folder / "payload-ran"


def test_the_payload_works(folder: Path, mark: Path) -> None:
    torch.save(Payload(mark), folder / "weights.bin")
    torch.load(folder / "weights.bin", weights_only=False)
    assert mark.exists()


def poison_weights(model: Path, mark: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Payload(mark)}, model / "pytorch_model.bin")


def poison_old_weights(model: Path, mark: Path) -> None:
    """The form from before torch 1.6, a bare pickle."""
    (model / "model.safetensors").unlink()
    payload = {"lm_head.weight": Payload(mark)}
    torch.save(payload, model / "pytorch_model.bin", _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("poison", [poison_weights, poison_old_weights])
@pytest.mark.parametrize(
    "load",
    [load_policy, lambda path: load_reward_model(path, fresh_head=True)],
    ids=["policy", "reward"],
)
def test_weights_that_are_a_pickle_of_code_are_refused(
    poison: Callable[[Path, Path], None], load: Callable[[Path], Any], folder: Path, mark: Path
) -> None:
    poison(folder / "llama", mark)
    with pytest.raises((UnpicklingError, ValueError)):
        load(folder / "llama")
    assert not mark.exists()


def test_the_command_line_refuses_them_in_one_line(
    folder: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poison_weights(folder / "llama", mark)
    data = ["--data.train", str(folder / "texts.jsonl"), "--run.dir", str(folder / "run")]
    assert main(["sft", "--model.path", str(folder / "llama"), *data]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "pickle" in said
    assert not mark.exists()


def test_weights_in_torch_s_own_form_without_code_are_read(folder: Path) -> None:
    model = load_policy(folder / "llama")
    (folder / "llama/model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "llama/pytorch_model.bin")
    again = load_policy(folder / "llama")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_code_beside_a_model_is_not_run(folder: Path, mark: Path) -> None:
    model = folder / "llama"
    code = f"import os\nos.mkdir({str(mark)!r})\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (model / name).write_text(code)
    (model / "custom_generate").mkdir()
    (model / "custom_generate/generate.py").write_text(code)
    auto_map = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoModelForSequenceClassification": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
    }
    edit(model / "config.json", auto_map=auto_map)
    edit(model / "tokenizer_config.json", auto_map=auto_map)
    load_policy(model)
    load_reward_model(model, fresh_head=True)
    load_tokenizer(model)
    edit(model / "config.json", model_type="evil")
    edit(model / "tokenizer_config.json", tokenizer_class="Evil")
    with pytest.raises(ValueError, match="contains custom code"):
        load_policy(model)
    with pytest.raises(ValueError, match="contains custom code"):
        load_reward_model(model, fresh_head=True)
    with pytest.raises(ValueError, match="contains custom code"):
        load_tokenizer(model)
    assert not mark.exists()
    with pytest.raises(ValueError, match=r"AttributeError: .*Evil"):  # it has no such class
        read_config(model, trust_remote_code=True)
    assert mark.exists()


def test_a_chat_template_cannot_reach_python(folder: Path) -> None:
    tokenizer = copy.copy(make_tokenizer())
    tokenizer.chat_template = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os }}"
    )
    save_model(load_policy(folder / "llama"), tokenizer, folder / "templated")
    render = chat_template(load_tokenizer(folder / "templated"))
    with pytest.raises(ValueError, match=r"the chat template refuses the row: .* is unsafe"):
        render([Message("user", "a")], True)


def test_an_adapter_s_pickle_is_not_read(folder: Path, mark: Path) -> None:
    adapter = folder / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(folder / "llama"), "r": 2}
    auto = {"base_model_class": "Evil", "parent_library": "evil"}
    (adapter / "evil.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    (adapter / "adapter_config.json").write_text(
        json.dumps({**settings, "target_modules": ["q_proj"], "auto_mapping": auto})
    )
    torch.save({"weight": Payload(mark)}, adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        load_policy(adapter)
    shutil.copy(adapter / "adapter_model.bin", adapter / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="cannot be used"):
        load_policy(adapter)
    assert not mark.exists()


def test_code_and_pickles_beside_data_are_not_run(
    folder: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = folder / "owner/data"
    data.mkdir(parents=True)
    code = f"import os\nos.mkdir({str(mark)!r})\n"
    for name in ("data.py", "dataset.py", "__init__.py", "conftest.py"):
        (data / name).write_text(code)
    torch.save(Payload(mark), data / "data.pkl")
    monkeypatch.chdir(folder)
    for source in ("owner/data", str(data)):
        with pytest.raises(ValueError, match=r"holds no \.jsonl"):
            load_examples(source, "sft", make_tokenizer(), max_length=64)
        with pytest.raises(ValueError, match="expected a name that ends in"):
            load_examples(f"{source}/data.py", "sft", make_tokenizer(), max_length=64)
    write_rows(data / "rows.jsonl", [{"text": "The menu"}])
    assert len(load_examples("owner/data", "sft", make_tokenizer(), max_length=64).groups) == 1
    shutil.copy(data / "data.pkl", data / "rows.parquet")
    with pytest.raises(ValueError, match="rows"):
        load_examples(data, "sft", make_tokenizer(), max_length=64)
    assert not mark.exists()


def test_a_checkpoint_s_pickles_are_not_run(folder: Path, mark: Path) -> None:
    train_sft(sft_config(folder, "run", stop_at_step=2))
    (checkpoint,) = (folder / "run/checkpoints").glob("step-*")
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    tensors = [file for file in checkpoint.iterdir() if file.suffix != ".json"]
    assert {file.suffix for file in tensors} == {".safetensors"}
    for file in (
        *tensors,
        checkpoint / "optimizer.pt",
    ):  # as if who wrote it wrote the manifest, too
        torch.save(Payload(mark), file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        manifest[file.name] = {"bytes": file.stat().st_size, "sha256": digest}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises((SafetensorError, ValueError)):
        train_sft(sft_config(folder, "run", resume=True))
    assert not mark.exists()


def test_a_pickle_in_the_cache_of_reference_log_probs_is_put_aside(
    folder: Path, mark: Path
) -> None:
    train_dpo(dpo_config(folder, "run", max_steps=1))
    (cached,) = (folder / "reference").glob("*.safetensors")
    torch.save(Payload(mark), cached)
    train_dpo(dpo_config(folder, "again", max_steps=1))
    with safe_open(cached, framework="pt") as computed_again:
        assert list(computed_again.keys())
    assert not mark.exists()
