"""One BOS, one EOS, a clean prompt boundary, and masks from lengths."""

import copy
import json
import random
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers

from fastalign.cli.main import main
from fastalign.data import tokenizer as tokenizer_module
from fastalign.data.examples import PreferenceExample
from fastalign.data.load import load_examples, load_prompts
from fastalign.data.tokenise import Encoder
from fastalign.data.tokenizer import eos_token_ids, template_clock
from tests.tokenizers import CHATML, THINKING, WITHOUT_END, make_tokenizer

BOS, EOS = 1, 2
CHATML_END = 4
USER = {"role": "user", "content": "What is the best phone?"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    file = path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def learned(group: Any, number: int = 0) -> list[int]:
    return [group.response_ids[number][place] for place in group.target_positions(number)]


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("pad_is_eos", [True, False])
@pytest.mark.parametrize("bos_in_text", [True, False])
def test_plain_pairs_have_at_most_one_bos_and_learn_one_eos(
    tmp_path: Path, adds_bos: bool, pad_is_eos: bool, bos_in_text: bool
) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos, pad_is_eos=pad_is_eos)
    prompt = ("<s>" if bos_in_text else "") + "The camera is"
    file = write(tmp_path, {"prompt": prompt, "chosen": " good</s>", "rejected": " slow"})
    (group,) = load_examples(file, "preference", tokenizer, max_length=99).groups
    for number, text in enumerate((" good", " slow")):
        response = list(group.response_ids[number])
        whole = [*group.prompt_ids, *response]
        assert whole.count(BOS) == (1 if adds_bos or bos_in_text else 0)
        assert response.count(EOS) == 1
        assert learned(group, number) == response
        assert response[-1] == EOS
        assert tokenizer.decode(whole, skip_special_tokens=True) == "The camera is" + text


def test_the_prompt_is_what_a_sampler_is_given(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    rows = {"prompt": "The battery", "completion": " is excellent"}
    file = write(tmp_path, rows)
    (group,) = load_examples(file, "sft", tokenizer, max_length=99).groups
    prompts = load_prompts(file, tokenizer, max_length=99)
    assert (
        list(prompts.prompt_ids)
        == [list(group.prompt_ids)]
        == [tokenizer("The battery")["input_ids"]]
    )


@pytest.mark.parametrize("prefix_space", [True, False])
def test_a_token_never_crosses_the_boundary_and_the_row_is_counted(
    tmp_path: Path, prefix_space: bool
) -> None:
    tokenizer = make_tokenizer(prefix_space=prefix_space)
    # "battery" is one token: cut inside it, the prompt must stay what it is alone.
    file = write(
        tmp_path,
        {"prompt": "The batt", "chosen": "ery life", "rejected": "le"},
        {"prompt": "The", "chosen": " screen", "rejected": " menu"},
    )
    data = load_examples(file, "preference", tokenizer, max_length=99)
    group = data.groups[0]
    assert list(group.prompt_ids) == tokenizer("The batt")["input_ids"]
    for response, text in zip(group.response_ids, ("ery life", "le"), strict=True):
        together = tokenizer.decode([*group.prompt_ids, *response], skip_special_tokens=True)
        assert together.strip() == "The batt" + text
    assert data.report.num_crossing == 1


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_text_is_learned_from_its_first_token_that_can_be(tmp_path: Path, adds_bos: bool) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    file = write(tmp_path, {"text": "The menu is slow"})
    (group,) = load_examples(file, "sft", tokenizer, max_length=99).groups
    ids = tokenizer("The menu is slow", add_special_tokens=False)["input_ids"]
    expected = [BOS, *ids, EOS] if adds_bos else [*ids, EOS]
    assert [*group.prompt_ids, *group.response_ids[0]] == expected
    assert learned(group) == expected[1:]


@pytest.mark.parametrize("pad_is_eos", [True, False])
def test_a_conversation_ends_as_its_template_says_once(tmp_path: Path, pad_is_eos: bool) -> None:
    tokenizer = make_tokenizer(adds_bos=False, pad_is_eos=pad_is_eos, chat_template=CHATML)
    file = write(tmp_path, {"prompt": [USER], "chosen": [YES], "rejected": [NO]})
    (group,) = load_examples(file, "preference", tokenizer, max_length=99).groups
    rendered = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(group.prompt_ids) == rendered
    for number, text in enumerate(("yes", "no")):
        assert tokenizer.decode(learned(group, number)) == f"{text}<|im_end|>"
        assert learned(group, number).count(CHATML_END) == 1


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, (EOS, CHATML_END)),
        (CHATML.replace("<|im_end|>", "</s>"), (EOS,)),
        (CHATML.replace("<|im_end|>", "<|im_end|></s>"), (EOS,)),
        (CHATML.replace("<|im_end|>", "[end]"), (EOS,)),  # no single token
        (WITHOUT_END, (EOS,)),
        ("{{ raise_exception('no') }}", (EOS,)),
        ("{{ 1 / 0 }}", (EOS,)),
        (None, (EOS,)),
    ],
)
def test_the_token_with_which_the_template_ends_an_answer_is_an_end_token(
    tmp_path: Path, template: str | None, ends: tuple[int, ...]
) -> None:
    tokenizer = copy.copy(make_tokenizer(adds_bos=False))  # its EOS is </s>
    tokenizer.chat_template = template
    assert eos_token_ids(tokenizer) == ends
    if template == CHATML:
        file = write(tmp_path, {"prompt": [USER], "chosen": [YES], "rejected": [NO]})
        (group,) = load_examples(file, "preference", tokenizer, max_length=99).groups
        assert learned(group)[-1] == CHATML_END


def test_a_template_without_an_end_still_learns_to_stop(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(chat_template=WITHOUT_END)
    file = write(tmp_path, {"messages": [USER, YES, USER, NO]})
    groups = load_examples(file, "sft", tokenizer, max_length=99).groups
    assert len(groups) == 2  # in one sequence the first answer would not end
    for group in groups:
        assert [*group.prompt_ids, *group.response_ids[0]].count(BOS) == 1
        assert learned(group)[-1] == EOS
        assert learned(group).count(EOS) == 1


def test_every_assistant_turn_is_learned_and_nothing_else(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(adds_bos=False, chat_template=CHATML)
    file = write(tmp_path, {"messages": [USER, YES, {**USER, "content": "maybe"}, NO]})
    (group,) = load_examples(file, "sft", tokenizer, max_length=99).groups
    assert tokenizer.decode(learned(group)) == "yes<|im_end|>no<|im_end|>"
    rendered = tokenizer.apply_chat_template(
        [USER, YES, {**USER, "content": "maybe"}, NO], tokenize=False
    )
    whole = tokenizer.decode([*group.prompt_ids, *group.response_ids[0]])
    assert whole == rendered.rstrip()


def test_an_answer_closes_the_think_block_that_its_prompt_opens(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(adds_bos=False, chat_template=THINKING)
    file = write(tmp_path, {"prompt": [USER], "chosen": [YES], "rejected": [NO]})
    (group,) = load_examples(file, "preference", tokenizer, max_length=99).groups
    assert tokenizer.decode(group.prompt_ids).endswith("<|im_start|>assistant\n<think>\n")
    assert tokenizer.decode(learned(group)) == "\n</think>\n\nyes<|im_end|>"


def test_a_tokenizer_that_a_test_changed_is_no_other_tests_tokenizer() -> None:
    make_tokenizer().chat_template = CHATML
    assert make_tokenizer().chat_template is None


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    file = write(tmp_path, {"messages": [USER, YES]})
    with pytest.raises(ValueError, match="no chat template"):
        load_examples(file, "sft", make_tokenizer(), max_length=99)


def test_a_tie_is_refused_kept_or_counted(tmp_path: Path) -> None:
    rows: Sequence[dict[str, Any]] = [
        {"prompt": "The", "response_a": " menu", "response_b": " screen", "label": label}
        for label in ("a", "b", "tie")
    ]
    file = write(tmp_path, *rows)
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: column 'label': a tie"):
        load_examples(file, "preference", tokenizer, max_length=99)
    kept = load_examples(file, "preference", tokenizer, max_length=99, ties="keep")
    assert kept.ties == [False, False, True]
    menu, screen = kept.groups[0].response_ids
    assert list(kept.groups[1].response_ids) == [screen, menu]
    assert list(kept.groups[2].response_ids) == [menu, screen]
    dropped = load_examples(file, "preference", tokenizer, max_length=99, ties="drop")
    assert (len(dropped.groups), dropped.report.num_ties_dropped) == (2, 1)
    assert dropped.fingerprint != kept.fingerprint


def test_nothing_is_cut_without_being_asked_for_and_counted(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        {"prompt": "The", "completion": " menu is slow and the screen is dim"},
        {"prompt": "The", "completion": " menu"},
        {"prompt": "The screen is too dim, the buttons are small and slow", "completion": " yes"},
    )
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: expected at most 6 tokens"):
        load_examples(file, "sft", tokenizer, max_length=6)
    skipped = load_examples(file, "sft", tokenizer, max_length=6, on_too_long="skip")
    assert (len(skipped.groups), skipped.report.num_too_long) == (1, 2)
    cut = load_examples(file, "sft", tokenizer, max_length=6, on_too_long="truncate")
    assert (cut.report.num_truncated, cut.report.num_too_long) == (1, 1)
    assert [group.num_tokens for group in cut.groups] == [6, skipped.groups[0].num_tokens]
    assert EOS not in cut.groups[0].response_ids[0]


def test_bad_rows_are_raised_or_counted(tmp_path: Path) -> None:
    file = write(tmp_path, {"text": "a"}, {"text": 3}, {"text": "b"})
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: column 'text'"):
        load_examples(file, "sft", make_tokenizer(), max_length=99)
    report = load_examples(file, "sft", make_tokenizer(), max_length=99, on_bad_row="skip").report
    assert (report.num_rows, report.num_used, len(report.faults)) == (3, 2, 1)


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path, {"text": 3})
    with pytest.raises(ValueError, match="no row is left"):
        load_examples(file, "sft", make_tokenizer(), max_length=99, on_bad_row="skip")


def test_repeated_rows_are_counted(tmp_path: Path) -> None:
    file = write(tmp_path, {"text": "a"}, {"text": "b"}, {"text": "a"})
    assert load_examples(file, "sft", make_tokenizer(), max_length=99).report.num_duplicates == 1


BAD = {"role": "assistant", "content": "no"}
LATER = [{"role": "user", "content": "maybe"}, YES]


@pytest.mark.parametrize("template", [CHATML, THINKING])
@pytest.mark.parametrize(
    "key", [{"weight": 0}, {"train": False}, {"trainable": False}, {"loss_mask": 0}, {"loss": 0.0}]
)
def test_a_key_of_a_message_keeps_it_from_being_learned(
    template: str, key: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(chat_template=template)
    rows = [{"messages": [USER, {**BAD, **mark}, *LATER]} for mark in ({}, key)]
    data = load_examples(write(tmp_path, *rows), "sft", tokenizer, max_length=99)
    *both, one = data.groups
    assert len(both) == (2 if template == THINKING else 1)
    assert "no" in tokenizer.decode(learned(both[0]))
    assert tokenizer.decode(learned(one)).rpartition("\n")[2] == "yes<|im_end|>"
    assert [*both[-1].prompt_ids, *both[-1].response_ids[0]] == [
        *one.prompt_ids,
        *one.response_ids[0],
    ]
    line = data.report.log_lines()[-1]
    assert line.endswith("1 answers are not learned, by a key of the message")
    last = {"messages": [USER, YES, LATER[0], {**BAD, **key}]}
    (group,) = load_examples(write(tmp_path, last), "sft", tokenizer, max_length=99).groups
    assert "no" not in tokenizer.decode(learned(group))
    assert "yes" in tokenizer.decode(learned(group))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({**BAD, "weight": 0.5}, "message 2: weight: expected 0, 1, true or false, got"),
        ({**BAD, "weight": 0, "train": True}, "weight and train contradict"),
        ({**BAD, "reasoning": "so"}, "the chat template does not read reasoning_content"),
        ({**BAD, "prefix": True}, "prefix is not supported"),
        ({**BAD, "train_detail": [1]}, "'train_detail' is not supported; of such keys only weight"),
        ({**BAD, "weight": 0}, "no message of the assistant is to be learned"),
    ],
)
def test_a_key_that_cannot_be_honoured_is_refused_by_row(
    message: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(chat_template=CHATML)
    file = write(tmp_path, {"messages": [USER, YES]}, {"messages": [USER, message]})
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2.*{expected}"):
        load_examples(file, "sft", tokenizer, max_length=99)
    pairs = {"prompt": [{**USER, "weight": 1}], "chosen": [YES], "rejected": [BAD]}
    with pytest.raises(ValueError, match="only messages of the assistant are learned"):
        load_examples(write(tmp_path, pairs), "preference", tokenizer, max_length=99)
    pairs = {"prompt": [USER], "chosen": [{**YES, "weight": 0}], "rejected": [BAD]}
    with pytest.raises(ValueError, match="not supported in a comparison"):
        load_examples(write(tmp_path, pairs), "preference", tokenizer, max_length=99)


def test_keys_of_messages_that_nothing_uses_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{**USER, "name": "tom"}, {**YES, "name": "me", "id\x1b[2J": 3, "weight": None}]
    file = write(tmp_path, {"messages": turns})
    assert main(["data", "check", str(file)]) == 0
    out = capsys.readouterr().out
    assert "keys of messages that nothing uses: 'id\\x1b[2J' (1), 'name' (2)" in out


def with_template(text: str) -> Any:
    tokenizer = copy.copy(make_tokenizer(chat_template=CHATML))
    tokenizer.chat_template = text
    return tokenizer


def test_a_templates_date_is_the_clocks(tmp_path: Path) -> None:
    tokenizer = with_template("{{ strftime_now('%d %b %Y') }}" + CHATML)
    file = write(tmp_path, {"messages": [USER, YES]})
    prints = []
    for moment in (datetime(2026, 11, 29), datetime(2026, 11, 30), datetime(2026, 11, 29)):
        with template_clock(moment):
            data = load_examples(file, "sft", tokenizer, max_length=99)
        prints.append(data.fingerprint)
        assert f"{moment:%d %b %Y}" in tokenizer.decode(data.groups[0].prompt_ids)
    assert prints[0] == prints[2] != prints[1]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ 1 / 0 }}", "fails on the row: ZeroDivisionError"),
        pytest.param(
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            "fails on the row: RecursionError",
            # A callback of torch's that comes at the end of the stack fails, too.
            marks=pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
        ),
        ("{{ messages[0].content.nothing.more }}", "refuses the row"),
        ("{{ raise_exception(messages[0].content) }}", r"refuses the row: .*x1b\[2J"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "did not end within 0.1 seconds",
        ),
    ],
)
def test_a_template_that_fails_in_any_way_refuses_the_row_in_one_line(
    template: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "did not end" in expected:  # the others may take longer on a busy machine
        monkeypatch.setattr(tokenizer_module, "MAX_RENDER_SECONDS", 0.1)
    file = write(tmp_path, {"messages": [{**USER, "content": "a\x1b[2J\u202e"}, YES]})
    with pytest.raises(ValueError, match=rf"rows\.jsonl:1: .*{expected}") as found:
        load_examples(file, "sft", with_template(template), max_length=99)
    assert str(found.value).isprintable()


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PARTS = [
    *"abT'.,!?()\n\r\t 1234\u00e9e\u0301\u4e2d",
    *(" the", " menu", " is", " it's", " 's", "  "),
]


def split_by(pattern: str, normalizer: Any = None, tokens: Sequence[Any] = ()) -> Any:
    tokenizer = make_tokenizer(chat_template=CHATML)
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    if normalizer is not None:
        tokenizer.backend_tokenizer.normalizer = normalizer
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def rows_of(encoder: Encoder) -> list[Any]:
    """Rows of random text, which tokens, words and spaces on either side of the boundary have."""
    draw = random.Random(0)

    def text() -> str:
        return "".join(draw.choices(PARTS, k=draw.randrange(1, 9)))

    return encoder.rows(
        [PreferenceExample(text(), text(), text(), False, None, None, "", "") for _ in range(800)]
    )


@pytest.mark.parametrize(
    ("tokenizer", "splits", "would_differ"),
    [
        (make_tokenizer(), True, False),
        (split_by(GPT2), True, False),
        (split_by(LLAMA, normalizers.NFC()), True, False),
        (split_by(LLAMA.replace("{1,3}", "")), True, False),
        (split_by("", tokens=["  ", " it"]), True, False),
        (split_by(LLAMA, normalizers.NFKC()), False, False),
        (split_by("[ab]+ the| ?.|\\s"), False, True),
        (split_by("", tokens=["a the"]), False, True),
        (split_by("", tokens=[AddedToken("!", rstrip=True)]), False, True),
        (make_tokenizer(prefix_space=True), False, False),
    ],
)
def test_a_prompt_encoded_once_up_to_a_word_has_the_tokens_of_the_whole_text(
    tokenizer: Any, splits: bool, would_differ: bool
) -> None:
    encoder = Encoder(tokenizer)
    assert encoder._splits_at_spaces == splits
    found = repr(rows_of(encoder))
    encoder._splits_at_spaces = not splits
    assert (repr(rows_of(encoder)) != found) == would_differ
    assert found.count("Group") > 700
