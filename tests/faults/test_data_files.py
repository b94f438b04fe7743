"""Data files: what is in them is read, or what is not is said; templates and vocabularies too."""

import bz2
import copy
import errno
import fcntl
import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from fastalign.cli.main import main
from fastalign.data import token_cache, tokenise
from fastalign.data import tokenizer as tokenizers
from fastalign.data.load import load_examples
from fastalign.models.load import save_model
from tests.faults.real import HEARD, Stage
from tests.faults.table import ALONE, Place, fault
from tests.faults.test_damage import shorten
from tests.runs.checkpoint.checkpoint_cases import flip_last_byte
from tests.small_runs import write_rows
from tests.tiny import tiny_model
from tests.tokenizers import CHATML, make_tokenizer

Said = Callable[..., int]
USER = {"role": "user", "content": "The menu"}
NO, YES = ({"role": "assistant", "content": text} for text in ("no", "yes"))


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Runs a command in this process; returns its exit code."""

    def run(*arguments: str | Path) -> int:
        code = main([str(argument) for argument in arguments])
        HEARD.extend(capsys.readouterr())
        assert "Traceback" not in HEARD[-2] + HEARD[-1]
        assert "\x1b" not in HEARD[-2] + HEARD[-1]
        return code

    return run


def new_folder(stage: Stage, run: str) -> Path:
    folder = stage.folder / run
    folder.mkdir()
    return folder


@fault(
    "a CSV of 20,000 rows with CR line ends; CR, LF and CRLF mixed; .tsv, .ndjson, .bz2, .zst",
    ALONE,
    does="read whole: `20000 of 20000 rows can be used`, `3 of 3 rows can be used`",
)
def test_line_ends(stage: Stage, run: str, place: Place, said: Said) -> None:
    folder = new_folder(stage, run)
    (folder / "mac.csv").write_bytes(b"prompt,completion\r" + b"a b,c\r" * 20_000)
    mixed = b'{"text": "a"}\r{"text": "b"}\r\n{"text": "c"}\n'
    (folder / "mixed.ndjson").write_bytes(mixed)
    (folder / "mixed.jsonl.bz2").write_bytes(bz2.compress(mixed))
    (folder / "tabs.tsv.zst").write_bytes(
        pyarrow.compress(b"prompt\tcompletion\na\tb\rc\td\r\ne\tf", codec="zstd", asbytes=True)
    )
    assert [said("data", "check", path) for path in sorted(folder.iterdir())] == [0] * 4


@fault(
    "a folder with files of other formats, a hidden file and a link to a folder; columns that "
    "nothing uses",
    ALONE,
    does="`not read: 4 others: 'linked/ (a link to a folder)', 'old.parquet.gz', '.old.jsonl', "
    "'notes.md'`, `columns that nothing uses: 'answer', 'bad_answer'`",
)
def test_not_read(stage: Stage, run: str, place: Place, said: Said) -> None:
    folder = new_folder(stage, run)
    write_rows(folder / "a.jsonl", [{"prompt": "a", "answer": "b", "bad_answer": "c"}])
    for name in ("old.parquet.gz", ".old.jsonl", "notes.md"):
        (folder / name).write_text("x")
    (folder / "linked").symlink_to(stage.folder)
    assert said("data", "check", folder) == 0


@fault(
    "a compressed file that is cut off, or goes on behind its end; a .json.gz of 33 million "
    "newlines; a Parquet footer of another file; a date that Python cannot hold; terminal escapes",
    ALONE,
    does="`cut.jsonl.bz2: the compressed file is cut off`, `more.jsonl.zst: damaged zstandard`, "
    "`newlines.json.gz: more than 4 MiB of white space`, `foreign.parquet: damaged parquet`, "
    "`dates.parquet:1: column 'prompt': a value of type timestamp[us] that cannot be read`, "
    "`got 'a\\x1b[2J'`, exit code 2",
)
def test_damaged(stage: Stage, run: str, place: Place, said: Said) -> None:
    import gzip

    folder, text = new_folder(stage, run), b'{"text": "a b"}\n' * 99
    (folder / "cut.jsonl.bz2").write_bytes(bz2.compress(text)[:-5])
    (folder / "more.jsonl.zst").write_bytes(
        pyarrow.compress(text, codec="zstd", asbytes=True) + b"more"
    )
    (folder / "newlines.json.gz").write_bytes(gzip.compress(b"[" + b"\n" * 2**25))
    dates = pyarrow.table({"prompt": pyarrow.array([2**62], pyarrow.timestamp("us"))})
    pyarrow.parquet.write_table(dates, folder / "dates.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 99}), folder / "foreign.parquet")
    whole, other = (folder / f"{name}.parquet" for name in ("foreign", "dates"))
    footer = other.read_bytes()[-8 - int.from_bytes(other.read_bytes()[-8:-4], "little") :]
    whole.write_bytes(whole.read_bytes()[:30] + footer)
    write_rows(folder / "escape.jsonl", [{"messages": [{**USER, "role": "a\x1b[2J"}]}])
    assert [said("data", "check", path) for path in sorted(folder.iterdir())] == [2] * 6


@fault(
    "keys of a message that change what is learned (`weight: 0`, `train: false`), and others",
    ALONE,
    does="`1 answers are not learned, by a key of the message`; one that cannot be honoured is "
    "refused: `rows.jsonl:2: column 'messages': message 2: weight: expected 0, 1, true or false`; "
    "others are counted: `keys of messages that nothing uses: 'name' (1)`",
)
def test_message_keys(stage: Stage, run: str, place: Place, said: Said) -> None:
    file = new_folder(stage, run) / "rows.jsonl"
    rows = [{"messages": [{**USER, "name": "tom"}, {**NO, "weight": 0}, USER, YES]}]
    write_rows(file, rows)
    assert said("data", "check", file) == 0
    write_rows(file, [*rows, {"messages": [USER, {**NO, "weight": 0.5}]}])
    assert said("data", "check", file) == 2


def dated_model(folder: Path, template: str) -> Path:
    tokenizer = copy.copy(make_tokenizer(chat_template=CHATML))
    tokenizer.chat_template = template
    save_model(tiny_model("llama", vocab_size=320), tokenizer, folder)
    return folder


@fault(
    "a chat template that writes today's date, and a resume on another day",
    ALONE,
    does="the run's date is kept (began.txt): `reference log-probs: 2 cached, 0 to compute`, and "
    "it goes on",
)
def test_template_date(
    stage: Stage, run: str, place: Place, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = new_folder(stage, run)
    model = dated_model(folder / "dated", "{{ strftime_now('%d %b %Y') }}" + CHATML)
    rows = [{"prompt": [USER], "chosen": [YES], "rejected": [NO]}] * 2
    flags = [
        *("--model.path", model, "--data.train", write_rows(folder / "rows.jsonl", rows)),
        *("--run.dir", folder / "run", "--train.batch-size", "2", "--train.max-steps", "2"),
        *("--train.device", "cpu", "--reference.cache-dir", folder / "cache"),
    ]
    assert said("dpo", *flags, "--train.stop-at-step", "1") == 0
    HEARD.clear()
    moment = datetime.fromisoformat((folder / "run/began.txt").read_text().strip())
    assert abs((datetime.now() - moment).total_seconds()) < 3600
    later = type("Later", (datetime,), {"now": classmethod(lambda cls, tz=None: cls(2036, 1, 1))})
    monkeypatch.setattr("fastalign.runs.folder.datetime", later)
    monkeypatch.setattr(tokenizers, "datetime", later)
    assert said("dpo", *flags, "--run.resume") == 0


@fault(
    "a chat template with `1/0`, without an end, or with a terminal's escapes in what it raises",
    ALONE,
    does="`rows.jsonl:1: the chat template fails on the row: ZeroDivisionError`, `it did not end "
    "within 0.1 seconds`, `refuses the row: \\x1b[2J`, exit code 2",
)
def test_template_faults(
    stage: Stage, run: str, place: Place, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizers, "MAX_RENDER_SECONDS", 0.1)
    folder = new_folder(stage, run)
    file = write_rows(folder / "rows.jsonl", [{"messages": [USER, YES]}])
    loop = "{% for i in range(9999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    for number, template in enumerate(("{{ 1/0 }}", loop, "{{ raise_exception('\x1b[2J') }}")):
        tokenizer = copy.copy(make_tokenizer(chat_template=CHATML))
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder / str(number))
        assert said("data", "check", file, "--tokenizer", folder / str(number)) == 2


@fault(
    "a batch larger than the data, of pairs and of prompts",
    ALONE,
    does="`12 examples, train.batch_size 64: a step takes each example once`, `13 examples, "
    "train.batch_size 30: a step samples each prompt 2 or 3 times`",
)
def test_large_batch(stage: Stage, run: str, place: Place, said: Said) -> None:
    for trainer, size in (("dpo", "64"), ("ppo", "30")):
        values: dict[str, Any] = yaml.safe_load((stage.folder / f"{trainer}.yaml").read_text())
        values["run"]["dir"] = str(stage.folder / f"{run}-{trainer}")
        values["train"] |= {"max_steps": 1, "save_every": 0}
        config = stage.folder / f"{run}-{trainer}.yaml"
        config.write_text(yaml.safe_dump(values))
        assert said(trainer, "--config", config, "--train.batch-size", size) == 0


@fault(
    "sampled ids beyond the tokenizer, of a padded vocabulary; an added token under an adapter",
    ALONE,
    does="`sampled ids are no token of the tokenizer, which has 321`; `added tokens in the data: "
    "'<new>'; their embeddings stay as they are under an adapter`",
)
def test_vocabulary(stage: Stage, run: str, place: Place, said: Said) -> None:
    folder = new_folder(stage, run)
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.add_tokens(["<new>"])
    save_model(tiny_model("llama", vocab_size=640), tokenizer, folder / "padded")
    file = write_rows(folder / "rows.jsonl", [{"prompt": "The <new>", "completion": " menu"}] * 4)
    model = ("--model.path", folder / "padded")
    flags = ("--sampling.max-new-tokens", "8", "--out", folder / "samples.jsonl")
    assert said("generate", *model, "--data.prompts", file, *flags, "--model.device", "cpu") == 0
    assert len(list(map(json.loads, (folder / "samples.jsonl").read_text().splitlines()))) == 4
    train = ("--train.batch-size", "2", "--train.max-steps", "1", "--train.device", "cpu")
    adapter = ("--model.lora.rank", "2", "--run.dir", folder / "run")
    assert said("sft", *model, "--data.train", file, *adapter, *train) == 0


def no_space(*args: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@fault(
    "the cache of tokens: a byte flipped, truncated, its notes truncated, one of both files "
    "deleted, half a file of a killed process; written by another process just now; no room, "
    "no folder",
    ALONE,
    does="the same tokens each time: `damaged cache of tokens in ...arrow is damaged (its SHA-256 "
    "differs)); tokenised again`, `arrow has ... bytes, expected`, `arrow is missing`, `.json: "
    "Unterminated`; it waits for the other process, and reads what that wrote; `tokens are not "
    "kept for later runs: [Errno 28] No space left on device`, and it goes on",
)
def test_token_cache(stage: Stage, run: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = new_folder(stage, run)
    rows = [{"prompt": [USER], "chosen": [YES], "rejected": [NO]}] * 3
    file, tokenizer = write_rows(folder / "rows.jsonl", rows), make_tokenizer(chat_template=CHATML)

    def load() -> Any:
        data = load_examples(file, "preference", tokenizer, max_length=99)
        return list(data.groups), list(data.sources), data.report.lines(), data.fingerprint

    def refuse(*args: object) -> None:
        raise AssertionError("tokenised although it is kept")

    monkeypatch.setattr(token_cache, "print", HEARD.append, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    in_memory = load()
    monkeypatch.setattr(token_cache, "LARGE_BYTES", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    assert load() == in_memory
    (arrow,) = (folder / "cache").rglob("*.arrow")
    notes, left = arrow.with_suffix(".json"), arrow.with_name(f".{arrow.name}.1")
    damages: list[Callable[[], object]] = [
        lambda: flip_last_byte(arrow),
        lambda: shorten(arrow),
        lambda: shorten(notes),
        arrow.unlink,
        notes.unlink,
        lambda: left.write_bytes(b"half"),
    ]
    for damage in damages:
        damage()
        assert load() == in_memory
        with monkeypatch.context() as patch:
            patch.setattr(tokenise.Encoder, "rows", refuse)
            assert load() == in_memory
    notes.unlink()
    assert load() == in_memory
    assert not left.exists()

    kept = {path: path.read_bytes() for path in (arrow, notes)}
    notes.unlink()
    with arrow.with_suffix(".lock").open("a") as lock, monkeypatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def other_ends(text: str) -> None:
            if text.startswith("waiting for another process, which tokenises into"):
                for path, content in kept.items():
                    path.write_bytes(content)
                fcntl.flock(lock, fcntl.LOCK_UN)

        patch.setattr(token_cache, "print", other_ends)
        patch.setattr(tokenise.Encoder, "rows", refuse)
        assert load() == in_memory

    arrow.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "sync", no_space)
        assert load() == in_memory
    assert {path.suffix for path in arrow.parent.iterdir()} == {".lock", ".json"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert load() == in_memory
    assert "not kept for later runs: [Errno 20] Not a directory" in HEARD[-1]
