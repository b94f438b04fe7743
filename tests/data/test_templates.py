# ruff: noqa: RUF001  (DeepSeek's tokens have wide bars)
"""Real chat templates: prompts as `apply_chat_template` gives them, learned tokens as TRL's masks.

The templates are those of the installed TRL, which also has versions of them that mark what is
trained on (`trl/chat_templates/*_training.jinja`, Apache 2.0).
"""

import json
import re
from functools import cache
from importlib.util import find_spec
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

from fastalign.cli.main import main
from fastalign.data.conversation import content_as_json, json_as_content
from fastalign.data.examples import parse
from fastalign.data.load import load_examples, load_prompts
from fastalign.data.readers.row import DataFault, Row
from fastalign.data.tokenise import Encoder
from fastalign.data.tokenizer import eos_token_ids, load_tokenizer
from tests.tokenizers import CHATML, THINKING, make_tokenizer

TRL = find_spec("trl")
needs_trl = pytest.mark.skipif(TRL is None, reason="TRL, which has the templates, is not installed")
SPECIAL = re.compile(r"<\|[\w/ ]+\|>|<｜[\w▁]+｜>|<[a-z]+_of_[a-z]+>|\[gMASK\]|<sop>|\[/?[A-Z_]+\]")

# As that of Mistral-7B-Instruct-v0.3: a user's last message shows the system prompt.
MISTRAL = (
    "{% set system = messages[0].content if messages[0].role == 'system' %}{{ bos_token }}"
    "{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' }}"
    "{{ system + '\\n\\n' if loop.last and system }}{{ message.content + '[/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content | trim + eos_token }}"
    "{% endif %}{% endfor %}"
)

SYSTEM = {"role": "system", "content": "You are terse."}
USER = {"role": "user", "content": "What is 2+2?"}
FOUR = {"role": "assistant", "content": "It is 4."}
NEXT = {"role": "user", "content": "And 3+3?"}
SIX = {"role": "assistant", "content": "Six, of course."}
CHAT = [SYSTEM, USER, FOUR, NEXT, SIX]
# Names of templates, and what is learned of each answer of CHAT, "{}" being its content. Under the
# first, CHAT is one example, under the others each answer is one.
TOGETHER = {
    **dict.fromkeys(("llama3", "llama3_2"), "{}<|eot_id|>"),
    **dict.fromkeys(("qwen2_5", "qwen3_instruct_2507", "qwen3_vl", "lfm2_v2"), "{}<|im_end|>"),
    "gemma3": "{}<end_of_turn>",
    "phi3": "{}<|end|>",
    "cohere2": "{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "smolvlm": " {}<end_of_utterance>",
    "glm4moe": "\n<think></think>\n{}<|user|>",
}
APART = {
    "qwen3": "<think>\n\n</think>\n\n{}<|im_end|>",
    "qwen3_5_think": "\n</think>\n\n{}<|im_end|>",
    "qwen3_5_nothink": "{}<|im_end|>",
    "nemotron_3_nano": "\n</think>\n\n{}<|im_end|>",
    "deepseek_r1_distill": "\n</think>\n\n{}<｜end▁of▁sentence｜>",
    "gptoss": "<|channel|>final<|message|>{}<|return|>",
    "mistral": " {}</s>",
}
# docs/data.md says how these differ from TRL's masks.
EXPLAINED = {"nemotron_3_nano", "deepseek_r1_distill", "gptoss"}


def source_of(name: str) -> str:
    if name == "mistral":
        return MISTRAL
    assert TRL is not None
    assert TRL.origin is not None
    return (Path(TRL.origin).parent / f"chat_templates/{name}.jinja").read_text(encoding="utf-8")


def with_template(source: str) -> Any:
    """Return a small tokenizer with a template and the special tokens that it writes."""
    tokenizer = make_tokenizer(adds_bos=False)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": sorted(set(SPECIAL.findall(source)))}
    )
    tokenizer.chat_template = source
    return tokenizer


@cache
def encoder_of(name: str) -> tuple[Encoder, Any]:
    tokenizer = with_template(source_of(name))
    encoder = Encoder(tokenizer)
    if name == "glm4moe":  # whose generation_config.json lists it
        encoder._ends = (*encoder._ends, tokenizer.convert_tokens_to_ids("<|user|>"))
    return encoder, tokenizer


def groups_of(name: str, turns: list[dict[str, Any]], **columns: Any) -> list[Any]:
    row = Row("rows.jsonl:1", {"messages": turns, **columns}, textual=False)
    example: Any = parse(row, "sft")
    return [group for group, _ in encoder_of(name)[0].row(example)]


def runs(ids: list[int], mask: Any) -> list[list[int]]:
    """Return the learned tokens of each answer."""
    marked = groupby(zip(mask, ids, strict=True), itemgetter(0))
    return [[token for _, token in part] for learned, part in marked if learned]


def answers_of(groups: list[Any]) -> list[tuple[list[int], list[int]]]:
    """Return each answer's learned tokens with those before it."""
    found = []
    for group in groups:
        before, ids = list(group.prompt_ids), list(group.response_ids[0])
        targets = set(group.target_positions(0))
        marked = [(place in targets, token) for place, token in enumerate(ids)]
        for learned, part in groupby(marked, itemgetter(0)):
            tokens = [token for _, token in part]
            if learned:
                found.append((before, tokens))
            before = before + tokens
    return found


def in_parts(name: str, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as the template reads them: SmolVLM's contents are lists."""
    if name != "smolvlm":
        return turns
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def rendered(name: str, turns: list[dict[str, Any]], **options: Any) -> list[int]:
    tokenizer, turns = encoder_of(name)[1], in_parts(name, turns)
    ids: list[int] = tokenizer.apply_chat_template(turns, return_dict=False, **options)
    return ids


@needs_trl
@pytest.mark.parametrize("name", [*TOGETHER, *APART])
def test_each_answer_is_learned_behind_the_prompt_that_a_sampler_is_given(name: str) -> None:
    _, tokenizer = encoder_of(name)
    groups = groups_of(name, CHAT)
    assert len(groups) == (1 if name in TOGETHER else 2)
    form = (TOGETHER | APART)[name]
    found = answers_of(groups)
    for (before, learned), place in zip(found, (2, 4), strict=True):
        assert before == rendered(name, CHAT[:place], add_generation_prompt=True)
        assert tokenizer.decode(learned) == form.format(CHAT[place]["content"])
    if name in TOGETHER:
        whole = [*groups[0].prompt_ids, *groups[0].response_ids[0]]
        end = 1 if name == "glm4moe" else 0  # its end is the next message's first token
        assert rendered(name, CHAT)[: len(whole) - end] == whole[: len(whole) - end]


# TRL has no training version of these two.
@needs_trl
@pytest.mark.parametrize("name", sorted({*TOGETHER, *APART} - {"mistral", "llama3_2"}))
def test_what_is_learned_is_what_trls_masks_have(name: str) -> None:
    _, tokenizer = encoder_of(name)
    options = {"chat_template": source_of(f"{name}_training"), "return_assistant_tokens_mask": True}
    theirs = tokenizer.apply_chat_template(in_parts(name, CHAT), return_dict=True, **options)
    same = []
    for (before, ours), marked in zip(
        answers_of(groups_of(name, CHAT)),
        runs(theirs["input_ids"], theirs["assistant_masks"]),
        strict=True,
    ):
        # Theirs may begin in our prompt, and go on with white space or EOS behind the end token.
        upto = len(marked) - marked[::-1].index(ours[-1]) if ours[-1] in marked else 0
        same.append((before + ours)[-upto:] == marked[:upto] if upto else False)
    assert all(same) == (name not in EXPLAINED)


def test_a_conversation_without_a_changed_prefix_is_one_example() -> None:
    assert len(groups_of("mistral", [USER, FOUR, NEXT, SIX])) == 1


@needs_trl
def test_reasoning_is_learned_where_the_template_shows_it() -> None:
    for key in ("reasoning_content", "reasoning", "thinking"):
        thought = {**FOUR, key: "two and two"}
        for name, form in {
            "qwen3": "<think>\ntwo and two\n</think>\n\nIt is 4.<|im_end|>",
            "qwen3_5_think": "two and two\n</think>\n\nIt is 4.<|im_end|>",
            "gptoss": "<|channel|>analysis<|message|>two and two<|end|><|start|>assistant"
            "<|channel|>final<|message|>It is 4.<|return|>",
        }.items():
            tokenizer = encoder_of(name)[1]
            ((_, learned),) = answers_of(groups_of(name, [USER, thought]))
            assert tokenizer.decode(learned) == form
        for name in ("llama3", "deepseek_r1_distill", "lfm2_v2"):
            with pytest.raises(DataFault, match=r"rows\.jsonl:1: .*not read reasoning_content"):
                groups_of(name, [USER, thought])
    # Its prompt closes the block in which the model would think.
    for thought in ({"reasoning_content": "so"}, {"content": "<think>\nso\n</think>\n\nIt is 4."}):
        with pytest.raises(DataFault, match="renders the prompt differently before an answer"):
            groups_of("qwen3_5_nothink", [USER, {**FOUR, **thought}])


@needs_trl
def test_reasoning_within_an_answer_is_not_lost() -> None:
    thought = {**FOUR, "content": "<think>\nso\n</think>\n\nIt is 4."}
    for name, form in {
        "qwen3": "<think>\nso\n</think>\n\nIt is 4.<|im_end|>",
        "deepseek_r1_distill": "so\n</think>\n\nIt is 4.<｜end▁of▁sentence｜>",
        "nemotron_3_nano": "so\n</think>\n\nIt is 4.<|im_end|>",
    }.items():
        _, tokenizer = encoder_of(name)
        found = answers_of(groups_of(name, [USER, thought, NEXT, thought]))
        assert [tokenizer.decode(learned) for _, learned in found] == [form, form]
        assert [tokenizer.decode(before).count("so\n") for before, _ in found] == [0, 0]


def test_an_answer_that_its_template_cuts_is_learned_whole() -> None:
    # As R1's first template: the prompt opens no block, and the answer loses its reasoning.
    cut = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    row = Row("r", {"messages": [USER, {**FOUR, "content": "<think>so</think>4"}]}, textual=False)
    tokenizer = with_template(cut)
    ((group, _),) = Encoder(tokenizer).row(parse(row, "sft"))  # type: ignore[arg-type]
    assert tokenizer.decode(group.response_ids[0]) == "<think>so</think>4<|im_end|>"


CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}}
WEATHER = {"name": "weather", "description": "Tells it.", "parameters": CITY}
TOOLS = [{"type": "function", "function": WEATHER}]
ASKED = {"name": "weather", "arguments": '{"city": "Oslo"}'}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "abcdefghi", "function": ASKED}],
}
RESULT = {"role": "tool", "content": "sunny", "tool_call_id": "abcdefghi", "name": "weather"}


@needs_trl
@pytest.mark.parametrize(
    ("name", "call"),
    [
        (
            "qwen2_5",
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
        ),
        ("llama3_2", '{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>'),
        (
            "gptoss",
            'functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>',
        ),
        ("glm4moe", "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>"),
    ],
)
def test_calls_and_descriptions_of_tools_are_as_the_template_writes_them(
    name: str, call: str
) -> None:
    _, tokenizer = encoder_of(name)
    turns = [USER, CALL, RESULT, SIX]
    found = answers_of(groups_of(name, turns, tools=json.dumps(TOOLS)))
    given: Any = json.loads(json.dumps(turns))
    given[1]["content"] = ""
    given[1]["tool_calls"][0]["function"]["arguments"] = {"city": "Oslo"}
    for (before, _), place in zip(found, (1, 3), strict=True):
        prompt = rendered(name, given[:place], add_generation_prompt=True, tools=TOOLS)
        assert before == prompt
    assert call in tokenizer.decode(found[0][1])
    assert "Tells it." in tokenizer.decode(found[0][0])
    assert "sunny" in tokenizer.decode(found[1][0])


@needs_trl
@pytest.mark.parametrize(
    ("name", "turns", "columns", "expected"),
    [
        ("phi3", [USER, FOUR], {"tools": TOOLS}, "does not show tools"),
        ("phi3", [USER, CALL, RESULT, SIX], {}, "does not show every one of tool_calls"),
        ("gemma3", [USER, NEXT, SIX], {}, "roles must alternate"),
        ("qwen3_5_think", [FOUR, NEXT, SIX], {}, "No user query found"),
        ("qwen2_5", [USER, {**FOUR, "tool_calls": [{"id": 1}]}], {}, "message 2: tool_calls: exp"),
        ("qwen2_5", [USER, {**FOUR, "reasoning": "a", "thinking": "b"}], {}, "differ"),
        ("qwen2_5", [USER, FOUR], {"tools": [{"x": b"y"}]}, "tools: expected what JSON can hold"),
        ("qwen2_5", [USER, FOUR], {"tools": [{"x": "\ud800"}]}, "tools: NUL or half a surrogate"),
        ("qwen2_5", [USER, {**FOUR, "thinking": "a\0"}], {}, "message 2: reasoning_content: NUL"),
        ("qwen2_5", [USER, FOUR], {"tools": "no"}, "'tools': tools: expected a list of objects"),
        ("qwen2_5", [USER, FOUR], {"audio": "a.wav"}, "'audio': this column is not supported"),
        (
            "qwen2_5",
            [{**USER, "content": [{"type": "image_url", "image_url": "x"}]}, FOUR],
            {},
            "message 1: only parts of type 'text' are supported, got 'image_url'",
        ),
    ],
)
def test_what_would_be_left_out_is_refused_by_row(
    name: str, turns: list[Any], columns: dict[str, Any], expected: str
) -> None:
    with pytest.raises(DataFault, match=rf"rows\.jsonl:1: .*{expected}"):
        groups_of(name, turns, **columns)


@needs_trl
def test_parts_of_text_two_users_in_a_row_and_an_assistant_first() -> None:
    _, tokenizer = encoder_of("qwen2_5")
    parts = [{"type": "text", "text": "What is 2+2?"}, {"type": "text", "text": "And 3+3?"}]
    ((before, _),) = answers_of(groups_of("qwen2_5", [{**USER, "content": parts}, SIX]))
    assert "user\nWhat is 2+2?\nAnd 3+3?<|im_end|>" in tokenizer.decode(before)
    ((before, _),) = answers_of(groups_of("qwen2_5", [USER, NEXT, SIX]))
    assert before == rendered("qwen2_5", [USER, NEXT], add_generation_prompt=True)
    first, second = answers_of(groups_of("qwen2_5", [FOUR, NEXT, SIX]))
    whole = rendered("qwen2_5", [FOUR, NEXT, SIX])
    assert first[0] + first[1] == whole[: len(first[0] + first[1])]
    assert second[0] == rendered("qwen2_5", [FOUR, NEXT], add_generation_prompt=True)
    assert tokenizer.decode(first[1]) == "It is 4.<|im_end|>"


def test_a_comparison_of_several_answers_needs_a_template_that_keeps_them(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"prompt": [USER], "chosen": [FOUR, NEXT, SIX], "rejected": [SIX]}
    file.write_text(json.dumps(row) + "\n")
    load_examples(file, "preference", make_tokenizer(chat_template=CHATML), max_length=99)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*earlier answers differently"):
        load_examples(file, "preference", with_template(THINKING), max_length=99)


def test_prompts_keep_their_tools(tmp_path: Path) -> None:
    source = "{% for t in tools or [] %}{{ t.function.name }}\n{% endfor %}" + CHATML
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": [USER, CALL, RESULT], "tools": TOOLS}) + "\n")
    tokenizer = with_template(source + "{{ messages | tojson }}")
    data = load_prompts(file, tokenizer, max_length=999)
    text = tokenizer.decode(data.prompt_ids[0])
    assert text.startswith("weather\n<|im_start|>")
    assert '"arguments": {"city": "Oslo"}' in text
    # Samples have the prompt as JSON, and are read again.
    written = content_as_json(data.prompts[0])
    assert json_as_content(written) == data.prompts[0]
    file.write_text(json.dumps({"prompt": written}) + "\n")
    assert load_prompts(file, tokenizer, max_length=999).prompt_ids[0] == data.prompt_ids[0]


def test_data_check_shows_what_a_row_becomes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_template(MISTRAL).save_pretrained(tmp_path / "model")
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": CHAT}) + "\n")
    assert main(["data", "check", str(file), "--tokenizer", str(tmp_path / "model")]) == 0
    out = capsys.readouterr().out
    assert r"prompt   '<s>[INST] You are terse.\n\nWhat is 2+2?[/INST]'" in out
    assert "learned  ' It is 4.</s>'" in out
    assert "1 rows are 2 examples, one of each answer" in out
    data = load_examples(file, "sft", with_template(MISTRAL), max_length=99)
    assert (data.report.num_used, len(data), data.report.num_split) == (1, 2, 1)


def test_the_end_that_both_a_last_and_an_earlier_answer_have_is_an_end_token() -> None:
    both = with_template(CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}")
    ends = {both.decode([token]) for token in eos_token_ids(both)}
    assert ends == {"</s>", "<|im_end|>"}


def test_a_tokenizer_that_loses_characters_is_refused_on_load(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    written = json.loads(file.read_text())
    # As in DeepSeek's files: transformers 5 builds one of this class, whatever tokenizer.json has.
    file.write_text(json.dumps(written | {"tokenizer_class": "LlamaTokenizerFast"}))
    with pytest.raises(ValueError, match=r"loses characters: 'What is .* decoded as 'Whatis2and"):
        load_tokenizer(tmp_path)
    file.write_text(json.dumps(written | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    load_tokenizer(tmp_path)
