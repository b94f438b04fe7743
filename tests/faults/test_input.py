"""Input without one meaning, with control characters or secrets; a damaged config.yaml."""

import copy
import json
import os
import sys
from dataclasses import dataclass

import torch
from safetensors.torch import load_file

from fastalign.models.load import save_model
from tests.faults.real import Stage, assert_same_bits, contents
from tests.faults.table import ALONE, DDP, Place, fault
from tests.small_runs import write_rows
from tests.tiny import tiny_model
from tests.tokenizers import CHATML, make_tokenizer


@fault(
    "a damaged config.yaml on a resume: empty, cut off, a key twice, not UTF-8",
    *(ALONE, DDP),
    does="`config.yaml: damaged: expected sections, got NoneType`, `config.yaml: not YAML: "
    "expected each key once, got 'model' twice`, exit code 2; nothing is changed, and with the "
    "file put back it ends with the bits of a run without a stop",
)
def test_damaged_config(stage: Stage, run: str, place: Place) -> None:
    stopped = stage.copy_of(stage.straight(place), run, last=3)
    before, config = contents(stopped), stopped.folder / "config.yaml"
    whole = config.read_bytes()
    for damaged in (b"", whole + b"model: 1\n", b"model: [" + whole, b"\xff\xfe" + whole):
        config.write_bytes(damaged)
        assert stage.run(place, run, "--run.resume").codes == [2] * place.num_ranks
        assert contents(stopped) == before
    config.write_bytes(whole)
    assert_same_bits(stage.finish(place, run, "--run.resume"), stage.straight(place))


@fault(
    "settings of two meanings, or beyond all numbers: a key or a section twice, 010, 1:30, inf",
    ALONE,
    does="`expected each key once, got 'optim' twice`, `expected a decimal number, or text in "
    "quotes, got 010`, `got 1:30`, `optim.eps: expected a finite number, got inf`, exit code 2 "
    "before anything is read",
)
def test_settings(stage: Stage, run: str, place: Place) -> None:
    file = stage.folder / "dpo.yaml"
    whole = file.read_text()
    for text in (
        "optim: {lr: 1}\noptim: {eps: 1}",
        "train: {batch_size: 010}",
        "run: {seed: 1:30}",
    ):
        file.write_text(text)
        outcome = stage.run(place, run)
        file.write_text(whole)
        assert outcome.codes == [2]
    assert stage.run(place, run, "--optim.eps", "inf").codes == [2]
    assert not (stage.folder / run).exists()


@fault(
    "control characters in a column's name, in the file's name",
    ALONE,
    does=r"they are printed as `\x1b[2J` and `\u202e`, never as they are",
)
def test_control_characters(stage: Stage, run: str, place: Place) -> None:
    rows = [{"prompt\x1b[2J": "a", "chosen": "b", "rejected\u202e": "c"}]
    data = write_rows(stage.folder / f"{run}\x1b[2J\u202e.jsonl", rows)
    outcome = stage.run(place, run, "--data.train", str(data))
    assert outcome.codes == [2]
    assert not set("\x1b\u202e") & set(outcome.outputs[0])


@fault(
    "a checkpoint in bfloat16, whose template ends answers with another token than EOS",
    ALONE,
    does="the model is written in bfloat16 and lists both tokens; where a weight does not fit, "
    "`model.save_dtype: ... which is beyond float16; expected float32 or bfloat16`, exit code 2",
)
def test_exported_model(stage: Stage, run: str, place: Place) -> None:
    base, tokenizer = stage.folder / f"{run}-base", copy.copy(make_tokenizer())
    tokenizer.chat_template = CHATML
    model = tiny_model("llama", vocab_size=320).bfloat16()
    model.get_input_embeddings().weight.data[319] = 2.0**17
    save_model(model, tokenizer, base)
    flags = ("--model.path", str(base), "--train.max-steps", "1", "--optim.lr", "0")
    whole = stage.finish(place, run, *flags)
    written = load_file(whole.folder / "model/model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.bfloat16}
    config = json.loads((whole.folder / "model/config.json").read_text())
    assert (config["dtype"], config["eos_token_id"]) == ("bfloat16", [2, 4])
    outcome = stage.run(place, f"{run}-half", *flags, "--model.save-dtype", "float16")
    assert outcome.codes == [2]
    assert not (outcome.folder / "model").exists()


@fault(
    "a signed address (Azure, S3) or a token among the settings",
    ALONE,
    does="`--data.eval: holds a password or a token, and settings are saved and printed`, exit "
    "code 2; nothing is written or printed of it",
)
def test_secrets(stage: Stage, run: str, place: Place) -> None:
    for secret in ("https://h/p.jsonl?sv=1&sig=abcd%3D", "s3://b/p?X-Amz-Signature=abcd"):
        outcome = stage.run(place, run, "--data.eval", secret)
        assert outcome.codes == [2]
        assert "abcd" not in outcome.outputs[0]
        assert not outcome.folder.exists()


@dataclass(frozen=True)
class ClosedOutput:
    """The run is started with `>&-`."""

    rank: int | None = 0

    def install(self) -> None:
        os.close(1)
        sys.stdout = None  # type: ignore[assignment]  # as Python has it then


@fault(
    "standard output that is closed (`>&-` in a shell)",
    ALONE,
    does="no file of the run takes its number; the run ends with the bits of another",
)
def test_closed_output(stage: Stage, run: str, place: Place) -> None:
    assert_same_bits(stage.finish(place, run, faults=[ClosedOutput()]), stage.straight(place))
    for row in (stage.folder / run / "metrics.jsonl").read_text().splitlines():
        json.loads(row)
