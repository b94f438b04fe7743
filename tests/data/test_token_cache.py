"""Rows as tokens: by several processes as by one, in a file that later starts read."""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastalign.batch.schedule import packed_lengths
from fastalign.batch.stored import stored
from fastalign.data import encode, load, token_cache
from fastalign.data.load import TokenizedDataset, load_examples, load_prompts
from fastalign.data.read import read_examples
from fastalign.data.report import DataReport
from fastalign.data.tokenise import Encoder
from fastalign.data.tokenizer import backend_as_it_is, is_plain, template_clock
from tests.tokenizers import CHATML, make_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every file is a large one, for two processes and batches of two rows."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "LARGE_BYTES", 1)
    monkeypatch.setattr(load, "BATCH_ROWS", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    return tmp_path / "cache/fastalign/tokens"


def turns(*texts: str) -> list[dict[str, str]]:
    return [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(texts)
    ]


PAIRS: list[Any] = [
    {"prompt": "The batt", "response_a": "ery life", "response_b": "le", "label": "b"},
    {"prompt": "The", "chosen": "", "rejected": " menu"},
    {"prompt": "The", "chosen": " ", "rejected": "a"},
    {"prompt": "The", "chosen": " screen", "rejected": " menu", "margin": 0.1},
    {
        "prompt": "The",
        "response_a": " a",
        "response_b": " b",
        "label": "tie",
        "votes": {"a": 1, "b": 2},
    },
    {"prompt": "The", "chosen": " screen", "rejected": " screen<|im_end|>"},
    {"prompt": "The", "chosen": " screen", "rejected": " menu", "margin": 0.1},
    3,
    {"prompt": "The battery life is excellent", "chosen": " screen" * 30, "rejected": " menu"},
]
TALKS: list[Any] = [
    {"messages": turns("The menu?", "yes", "The screen?", "no")},
    {"messages": turns("The menu?", "yes")},
    {"messages": turns("The menu?")},
]


def write(folder: Path, rows: list[Any]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def load_pairs(file: Path, tokenizer: Any = None, **options: Any) -> TokenizedDataset:
    rules = {"on_bad_row": "skip", "on_too_long": "truncate", "ties": "keep"} | options
    tokenizer = tokenizer or make_tokenizer(chat_template=CHATML)
    return load_examples(
        file, "preference", tokenizer, max_length=rules.pop("max_length", 24), **rules
    )


def everything(data: TokenizedDataset) -> tuple[Any, ...]:
    faults = [str(fault) for fault in data.report.faults]
    rows = (list(data.groups), data.ties, data.margins, data.votes, list(data.sources))
    return (*rows, data.report.lines(), faults, data.fingerprint)


def test_processes_give_what_one_gives_and_a_later_start_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, PAIRS)
    made = everything(load_pairs(file))
    assert "5 rows tokenised in" in capsys.readouterr().out
    assert [fault.split(":")[1] for fault in made[6]] == ["2", "3", "6", "8"]
    monkeypatch.setattr(Encoder, "rows", None)
    assert everything(load_pairs(file)) == made
    assert "the tokens of 5 rows are those of an earlier start" in capsys.readouterr().out
    monkeypatch.undo()
    assert everything(load_pairs(file)) == made  # small: by this process, and not kept
    assert made[5][-4:] == [
        "  1 rows with a token across the boundary of prompt and response",
        "  1 rows whose tokens are those of an earlier row",
        "  prompt tokens: min 2, median 2, 95% 14, max 14, total 25",
        "  response tokens: min 2, median 4, 95% 10, max 10, total 42",
    ]


def test_stored_groups_are_those_that_were_encoded(tmp_path: Path) -> None:
    file, tokenizer = write(tmp_path, TALKS), make_tokenizer(chat_template=CHATML)
    data = load_examples(file, "sft", tokenizer, max_length=99, on_bad_row="skip")
    examples = read_examples(file, "sft", DataReport(""), on_bad_row="skip")
    groups = [Encoder(tokenizer).row(example)[0][0] for example in examples]  # type: ignore[arg-type]
    assert repr(data.groups[:]) == repr(groups)
    assert len(groups) == 2
    assert list(data.groups[0].response_loss_mask[0]) != [True] * data.groups[0].num_tokens
    pairs = load_pairs(write(tmp_path, PAIRS)).groups
    for found in (data.groups, pairs):
        for packing in ("shared_prefix", "packed"):
            assert list(packed_lengths(found, packing)) == packed_lengths(found[:], packing)
        rows = [(g.prompt_ids, ids) for g in found for ids in g.response_ids]
        longest = [len(g.prompt_ids) + max(map(len, g.response_ids)) for g in found]
        assert list(stored(found).longest()) == longest
        assert stored(found).used_ids() == {token for row in rows for ids in row for token in ids}
        assert stored(found).last_ids() == {ids[-1] for _, ids in rows}


PROMPTS: list[Any] = [
    {"prompt": turns("The menu?", "yes", "The screen?")},
    3,
    {"prompt": turns("The battery life is excellent" * 3)},
    {"prompt": turns("refused")},
    {"prompt": turns("The menu?"), "chosen": turns("yes")[:1]},
]


@pytest.mark.parametrize("rows", [PROMPTS, [{"prompt": "The"}, {"prompt": "The\u00e9 menu"}]])
def test_prompts_are_those_of_one_by_one_and_a_later_start_reads_them(
    rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses = "{{ raise_exception('no') if messages[0].content == 'refused' }}"
    file, tokenizer = write(tmp_path, rows), make_tokenizer(chat_template=refuses + CHATML)

    def load_all() -> tuple[Any, ...]:
        skip: Any = {"on_bad_row": "skip", "on_too_long": "skip"}
        data = load_prompts(file, tokenizer, max_length=48, **skip)
        faults = [str(fault).partition(" ")[0] for fault in data.report.faults]
        found = (list(data.prompt_ids), list(data.prompts), list(data.sources))
        return *found, faults, data.report.lines(), data.fingerprint

    made = load_all()
    examples = [
        example
        for example in read_examples(file, "prompt", DataReport(""), on_bad_row="skip")
        if "refused" not in str(example.prompt) and "excellent" not in str(example.prompt)
    ]
    ids = [Encoder(tokenizer).prompt(example) for example in examples]  # type: ignore[arg-type]
    pairs = [(row, example.prompt) for row, example in zip(ids, examples, strict=True)]
    assert made[:3] == (ids, [prompt for _, prompt in pairs], [row.source for row in examples])
    assert made[5] == hashlib.sha256(repr(pairs).encode()).hexdigest()
    assert len(ids) == 2
    if rows is PROMPTS:
        assert made[3] == [f"{file}:2:", f"{file}:4:"]
        assert made[4][0] == f"{file}: 2 of 5 rows can be used"
        assert "  1 rows left out as too long" in made[4]
    monkeypatch.setattr(Encoder, "prompts", None)
    assert load_all() == made


def test_the_first_fault_of_the_file_is_raised(tmp_path: Path) -> None:
    rows = [PAIRS[3], PAIRS[5], PAIRS[7]]
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: the two responses have the same tokens"):
        load_pairs(write(tmp_path, rows), on_bad_row="error")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: expected at most 4 tokens, got 6"):
        load_pairs(write(tmp_path, PAIRS[3:5]), on_too_long="error", ties="error", max_length=4)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: column 'label': a tie, which this loss"):
        load_pairs(write(tmp_path, PAIRS[3:5]), ties="error")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: "):
        load_prompts(write(tmp_path, PROMPTS), make_tokenizer(chat_template=CHATML), max_length=99)


def test_what_changes_the_tokens_makes_another_file(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, tokenizer = write(tmp_path, PAIRS), make_tokenizer(chat_template=CHATML)

    def num_files(**options: Any) -> int:
        load_pairs(file, tokenizer, **options)
        return len(list(cache.glob("*.arrow")))

    assert [num_files(), num_files(), num_files(max_length=23)] == [1, 1, 2]
    tokenizer.add_tokens(["battery"])
    assert num_files() == 3
    tokenizer.chat_template += " "
    assert num_files() == 4
    write(tmp_path, PAIRS[3:])
    assert num_files() == 5
    monkeypatch.setattr(token_cache, "version", lambda library: "another")
    assert num_files() == 6


def test_a_template_that_writes_the_date_has_a_file_for_each_day(tmp_path: Path) -> None:
    from datetime import datetime

    tokenizer = make_tokenizer(chat_template=CHATML)
    tokenizer.chat_template += (
        '{% if strftime_now is defined %}{{ strftime_now("%d %b") }}{% endif %}'
    )
    identities = []
    for moment in (datetime(2026, 1, 2, 3), datetime(2026, 1, 2, 4), datetime(2026, 1, 3)):
        with template_clock(moment):
            identities.append(Encoder(tokenizer).identity())
    assert identities[0] == identities[1] != identities[2]
    tokenizer.chat_template += "{{ strftime_now(messages[0].content) }}"
    with template_clock(datetime(2026, 1, 2, 3)):
        assert "2026-01-02T03:00:00" in str(Encoder(tokenizer).identity())


def test_a_source_that_changes_meanwhile_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, keep = write(tmp_path, PAIRS), token_cache.keep

    def slow_keep(*args: Any) -> Any:
        found = keep(*args)
        write(tmp_path, PAIRS[3:])
        return found

    monkeypatch.setattr(token_cache, "keep", slow_keep)
    with pytest.raises(ValueError, match=r"rows\.jsonl: it changed while it was read"):
        load_pairs(file)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_of_two_starts_at_once_one_tokenises(tmp_path: Path, cache: Path) -> None:
    file, log, keep = write(tmp_path, PAIRS), tmp_path / "log", token_cache.keep
    barrier = multiprocessing.get_context("fork").Barrier(2)

    def start() -> None:
        def counted(*args: Any) -> Any:
            with log.open("a") as stream:
                stream.write("kept\n")
            return keep(*args)

        token_cache.keep = counted
        barrier.wait()
        with (tmp_path / str(os.getpid())).open("w") as stream:
            stream.write(load_pairs(file).fingerprint)

    context = multiprocessing.get_context("fork")
    starts = [context.Process(target=start) for _ in range(2)]
    for process in starts:
        process.start()
    for process in starts:
        process.join()
    assert [process.exitcode for process in starts] == [0, 0]
    assert len({(tmp_path / str(process.pid)).read_text() for process in starts}) == 1
    assert log.read_text() == "kept\n"


def killed(batch: int) -> int:
    os._exit(9)


def test_a_killed_process_is_one_line() -> None:
    batches: Iterator[int] = iter(range(9))
    with pytest.raises(ValueError, match="rows: a process that tokenises was killed; is there"):
        list(encode.in_order(killed, batches, 2, name="rows"))


def test_the_rust_tokenizer_is_called_where_transformers_call_does_no_more(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    file = write(tmp_path, PAIRS[3:5])
    examples = list(read_examples(file, "preference", DataReport(""), on_bad_row="error"))
    encoder = Encoder(tokenizer)
    direct = encoder.rows(examples)  # type: ignore[arg-type]
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert backend_as_it_is(tokenizer) is None
    assert encoder.rows(examples) == direct  # type: ignore[arg-type]
    assert backend_as_it_is(tokenizer) is not None
    tokenizer.split_special_tokens = True
    assert backend_as_it_is(tokenizer) is None
    assert is_plain(tokenizer)

    class Other(type(tokenizer)):  # type: ignore[misc]
        def _encode_plus(self, *args: Any, **options: Any) -> Any:
            return super()._encode_plus(*args, **options)

    tokenizer.__class__ = Other
    assert not is_plain(tokenizer)
