"""Files as real exports get them wrong, with what must be said of each."""

import bz2
import gzip
import json

import pyarrow

GOOD = '{"prompt": "a b", "chosen": " yes", "rejected": " no"}\n'
ZSTD: bytes = pyarrow.compress(b"text\n" + b"a b\n" * 500, codec="zstd", asbytes=True)
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def row(**values: object) -> str:
    base: dict[str, object] = {"prompt": "a b", "chosen": " yes", "rejected": " no"}
    return json.dumps({**base, **values}) + "\n"


def without(name: str) -> str:
    values = json.loads(GOOD)
    del values[name]
    return json.dumps(values) + "\n"


def turns(*pairs: tuple[str, object]) -> str:
    return json.dumps({"messages": [{"role": r, "content": c} for r, c in pairs]}) + "\n"


# name of the file, content, what the line must say; `bad.jsonl:2` is where the fault is
TEXT_CASES: dict[str, tuple[str, str | bytes, str]] = {
    "truncated-json": ("bad.jsonl", GOOD + '{"prompt": "a", "cho', "2:.*invalid JSON"),
    "cut-off-in-array": ("bad.json", '[{"prompt": "a", "chosen": "b"', "cut off"),
    "array-never-closed": (
        "bad.json",
        '[{"prompt": "a", "chosen": "b", "rejected": "c"}',
        "closed",
    ),
    "array-extra-comma": ("bad.json", f"[{GOOD.strip()},]", "invalid JSON"),
    "array-missing-comma": ("bad.json", f"[{GOOD.strip()} {GOOD.strip()}]", "','"),
    "after-the-array": ("bad.json", f"[{GOOD.strip()}] x", "after the array"),
    "array-of-numbers": ("bad.json", "[1, 2]", "expected a JSON object"),
    "top-level-object": ("bad.json", '{"data": [1]}', "JSON array"),
    "top-level-null": ("bad.json", "null", "JSON array"),
    "array-in-jsonl": ("bad.jsonl", f"[{GOOD.strip()}]\n", r"named \.json"),
    "pretty-printed": ("bad.jsonl", '{\n  "prompt": "a"\n}\n', "spread over lines"),
    "two-objects": ("bad.jsonl", GOOD + GOOD.strip() + GOOD, "2:.*two objects on one line"),
    "trailing-comma": ("bad.jsonl", GOOD + GOOD.strip() + ",\n", "2:.*comma after"),
    "python-dict": ("bad.jsonl", GOOD + "{'prompt': 'a'}\n", "2:.*double quotes"),
    "raw-tab": ("bad.jsonl", GOOD + '{"prompt": "a\tb"}\n', "2:.*raw line break"),
    "raw-newline": ("bad.jsonl", GOOD + '{"prompt": "a\nb"}\n', "2:.*invalid JSON"),
    "duplicated-key": ("bad.jsonl", '{"prompt": "a", "prompt": "b"}\n', "1:.*'prompt'.*twice"),
    "deep-nesting": ("bad.jsonl", "[" * 100_000 + "\n", "1:.*"),
    "number-row": ("bad.jsonl", GOOD + "3\n", "2:.*expected a JSON object"),
    "utf-16": ("bad.jsonl", GOOD.encode("utf-16"), "UTF-16"),
    "utf-16-no-mark": ("bad.jsonl", GOOD.encode("utf-16-le"), "UTF-16"),
    "utf-32": ("bad.jsonl", GOOD.encode("utf-32"), "UTF-32"),
    "latin-1": (
        "bad.jsonl",
        GOOD.encode() + row(chosen=1).replace("1", '"caf\xe9"').encode("latin-1"),
        "2:.*not UTF-8",
    ),
    "nul-bytes": ("bad.jsonl", GOOD + row(chosen="a\0b"), "2:.*NUL"),
    "lone-surrogate": ("bad.jsonl", GOOD + row(chosen="a\ud800"), "2:.*surrogate"),
    "gzip-without-suffix": ("bad.jsonl", gzip.compress(GOOD.encode()), "gzip"),
    "suffix-without-gzip": ("bad.jsonl.gz", GOOD, "not gzip"),
    "truncated-gzip": ("bad.jsonl.gz", gzip.compress(GOOD.encode() * 500)[:-20], "cut off"),
    "flipped-gzip": ("bad.jsonl.gz", gzip.compress(GOOD.encode() * 9)[:-8] + b"\0" * 8, "gzip"),
    "truncated-bzip2": ("bad.jsonl.bz2", bz2.compress(GOOD.encode() * 500)[:-9], "cut off"),
    "after-bzip2": ("bad.jsonl.bz2", bz2.compress(GOOD.encode() * 5) + b"more", "damaged bzip2"),
    "truncated-zstd": ("bad.csv.zst", ZSTD[:-3], "cut off"),
    "after-zstd": ("bad.csv.zst", ZSTD + b"more", "damaged zstandard"),
    "suffix-without-zstd": ("bad.jsonl.zst", GOOD, "not zstandard"),
    "newlines-for-ever": ("bad.json.gz", gzip.compress(b"[" + b"\n" * 2**25), "white space"),
    "tsv-with-commas": ("bad.tsv", "prompt,chosen\na,b\n", "expected tabs"),
    "zip": ("bad.jsonl", b"PK\x03\x04" + b"x" * 40, "zip archive"),
    "parquet-as-jsonl": ("bad.jsonl", b"PAR1" + b"x" * 40, "parquet"),
    "lfs-pointer": ("bad.jsonl", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "html": ("bad.jsonl", "<!DOCTYPE html><html></html>", "HTML"),
    "empty": ("bad.jsonl", "", "empty"),
    "blank-lines": ("bad.jsonl", "\n \n\n", "no rows"),
    "empty-array": ("bad.json", "[]", "no rows"),
    "unknown-suffix": ("bad.txt", GOOD, r"\.jsonl"),
    "missing-rejected": ("bad.jsonl", GOOD + without("rejected"), "2: column 'rejected': missing"),
    "null-chosen": ("bad.jsonl", GOOD + row(chosen=None), "2: column 'chosen'.*null"),
    "number-chosen": ("bad.jsonl", GOOD + row(chosen=3), "2: column 'chosen'.*the number 3"),
    "boolean-chosen": ("bad.jsonl", GOOD + row(chosen=True), "2: column 'chosen'.*boolean"),
    "object-chosen": ("bad.jsonl", GOOD + row(chosen={"text": "a"}), "2: column 'chosen'.*object"),
    "empty-chosen": ("bad.jsonl", GOOD + row(chosen=""), "2: column 'chosen'.*empty"),
    "blank-chosen": ("bad.jsonl", GOOD + row(chosen=" \n"), "2: column 'chosen'.*white space"),
    "empty-prompt": ("bad.jsonl", GOOD + row(prompt=""), "2: column 'prompt'.*empty"),
    "identical": ("bad.jsonl", GOOD + row(chosen=" no"), "2: column 'rejected': identical"),
    "nan-margin": ("bad.jsonl", GOOD + row(margin=float("nan")), "2: column 'margin'.*NaN"),
    "inf-margin": ("bad.jsonl", GOOD + row(margin=float("inf")), "2: column 'margin'.*finite"),
    "huge-margin": ("bad.jsonl", GOOD + row(margin=10**400), "2: column 'margin'.*finite"),
    "text-margin": ("bad.jsonl", GOOD + row(margin="big"), "2: column 'margin'.*number"),
    "boolean-margin": ("bad.jsonl", GOOD + row(margin=True), "2: column 'margin'.*boolean"),
    "wrong-label": (
        "bad.jsonl",
        '{"prompt": "a", "response_a": "b", "response_b": "c", "label": "A"}\n',
        "label.*'A'",
    ),
    "number-label": (
        "bad.jsonl",
        '{"prompt": "a", "response_a": "b", "response_b": "c", "label": 0}\n',
        "label",
    ),
    "no-label": (
        "bad.jsonl",
        '{"prompt": "a", "response_a": "b", "response_b": "c"}\n',
        "label.*missing",
    ),
    "both-forms": ("bad.jsonl", GOOD + row(response_a="x", response_b="y", label="a"), "2:.*both"),
    "chat-and-plain-sides": ("bad.jsonl", GOOD + row(chosen=CHAT), "2: column 'rejected'"),
    "chat-prompt-plain-sides": ("bad.jsonl", row(prompt=[CHAT[0]]), "1:.*conversation"),
    "mixed-rows": ("bad.jsonl", '{"text": "a"}\n' + turns(("user", "a"), ("assistant", "b")), "2:"),
    "plain-among-chat": (
        "bad.jsonl",
        row(prompt=[CHAT[0]], chosen=[CHAT[1]], rejected=[{**CHAT[1], "content": "bye"}]) + GOOD,
        "2: this row is plain text",
    ),
    "unknown-columns": ("bad.jsonl", '{"question": "a", "answer": "b"}\n', "rename"),
    "other-spelling": ("bad.jsonl", '{"Prompt": "a", "completion": "b"}\n', "rename 'Prompt'"),
    "unknown-role": (
        "bad.jsonl",
        turns(("human", "a"), ("gpt", "b")),
        "message 1: expected a role",
    ),
    "tool-first": ("bad.jsonl", turns(("tool", "a")), "message 1: expected role"),
    "two-answers": (
        "bad.jsonl",
        turns(("user", "a"), ("assistant", "b"), ("assistant", "c")),
        "message 3",
    ),
    "user-last": ("bad.jsonl", turns(("user", "a")), "expected the last message"),
    "null-content": ("bad.jsonl", turns(("user", None), ("assistant", "b")), "message 1:.*null"),
    "no-messages": ("bad.jsonl", '{"messages": []}\n', "empty list"),
    "sharegpt": ("bad.jsonl", '{"messages": [{"from": "human", "value": "a"}]}\n', "rename from"),
    "messages-as-text": (
        "bad.jsonl",
        json.dumps({"messages": json.dumps(CHAT)}) + "\n",
        "list of messages",
    ),
    "tool-calls": (
        "bad.jsonl",
        json.dumps({"messages": [CHAT[0], {**CHAT[1], "tool_calls": [1]}]}) + "\n",
        "tool_calls: expected a function with name and arguments",
    ),
    "images": ("bad.jsonl", GOOD + row(images=["x.png"]), "2: column 'images'.*not supported"),
    "implicit-nothing-common": ("bad.jsonl", '{"chosen": "abc", "rejected": "xyz"}\n', "no common"),
    "implicit-nothing-left": (
        "bad.jsonl",
        '{"chosen": "a b", "rejected": "a "}\n',
        "nothing follows",
    ),
    "unpaired": (
        "bad.jsonl",
        '{"prompt": "a", "completion": "b", "label": true}\n'
        '{"prompt": "a", "completion": "b", "label": "up"}\n',
        "2: column 'label': expected true or false, got 'up'",
    ),
    "csv-ragged": ("bad.csv", "prompt,chosen,rejected\na,b,c\nd,e\n", "3: expected 3 cells"),
    "csv-semicolons": ("bad.csv", "prompt;chosen;rejected\na;b;c\n", "commas"),
    "csv-open-quote": ("bad.csv", 'prompt,chosen,rejected\na,"b,c\n', "never closed"),
    "csv-column-twice": ("bad.csv", "prompt,prompt,rejected\na,b,c\n", "twice"),
    "csv-header-only": ("bad.csv", "prompt,chosen,rejected\n", "no rows"),
    "csv-list-as-text": (
        "bad.csv",
        f'messages\n"{json.dumps(CHAT).replace(chr(34), chr(34) * 2)}"\n',
        "CSV cannot hold lists",
    ),
    "parquet-damaged": ("bad.parquet", b"PAR1" + b"\0" * 40 + b"PAR1", "damaged parquet"),
    "parquet-is-text": ("bad.parquet", GOOD, "not parquet"),
}
