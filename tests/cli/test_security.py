"""Secrets stay in the environment, servers on this machine, data at home; pages run own scripts."""

import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from contextlib import redirect_stdout
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastalign.cli import vllm_server
from fastalign.cli.main import QUIET, main
from fastalign.cli.settings import ServedModel, VllmServerConfig
from fastalign.cli.vllm_server import is_loopback, server_command, server_token
from fastalign.output import masked, safe_output, visible
from fastalign.report.page import static
from fastalign.rollouts.engines.options import VllmOptions
from fastalign.rollouts.engines.server_process import find_token
from fastalign.runs.metrics import ProgressDisplay
from fastalign.trainers import train_sft
from tests.judge_server import chat, judge_server
from tests.small_runs import WORDS, folder, sentence, sft_config, write_rows

__all__ = ["folder"]

ROOT = Path(__file__).parents[2]
SECRET = "hf_Tqv7SECRETxyz"
ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)>'\"{{7*7}}"
OF_A_NAME = "<img src=x onerror=alert(3)>"


def texts_under(place: Path) -> str:
    files = [path for path in place.rglob("*") if path.is_file()]
    return "\n".join(path.read_bytes().decode("latin-1") for path in files)


def test_tokens_of_the_environment_are_not_in_what_a_run_writes_or_prints(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    data = ["--data.train", str(folder / "texts.jsonl"), "--train.max-steps", "2"]
    run = ["--run.dir", str(folder / "run")]
    assert main(["sft", "--model.path", str(folder / "llama"), *data, *run]) == 0
    out, err = capfd.readouterr()
    assert SECRET not in out + err
    assert (folder / "run/config.yaml").is_file()
    assert SECRET not in texts_under(folder)


ADDRESSES = [
    f"https://me:{SECRET}@data.example/pairs.jsonl",
    f"https://data.example/pairs.jsonl?version=2&token={SECRET}",
    f"https://data.example/pairs.jsonl?access_token={SECRET}#part",
    f"s3://bucket/pairs.jsonl?X-Amz-Signature={SECRET}",
]


@pytest.mark.parametrize("value", [*ADDRESSES, SECRET])
@pytest.mark.parametrize("written", ["flag", "flag=", "file"])
def test_a_setting_with_a_secret_is_refused_before_anything_is_written(
    value: str,
    written: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    run = tmp_path / "run"
    arguments = ["sft", "--model.path", "m", "--run.dir", str(run)]
    if written == "file":
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": {"train": value}}))
        arguments += ["--config", str(tmp_path / "run.yaml")]
    else:
        arguments += ["--data.train", value] if written == "flag" else [f"--data.train={value}"]
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert err.startswith("fastalign sft: --data.train: holds a password or a token")
    assert SECRET not in out + err
    assert not run.exists()


@pytest.mark.parametrize(
    "value",
    [
        f"https://store.blob.example/c/p.jsonl?sp=r&sv=2022-11-02&sr=b&sig={SECRET}%3D",
        f"s3://b/p.jsonl?X-Amz-Credential={SECRET}&X-Amz-Date=20240101T000000Z",
        f"https://b.example/p.jsonl?AWSAccessKeyId={SECRET}&Expires=1",
        f"https://b.example/p?x=1&code={'a1B2' * 9}",
        "datasets/hf_" + "Ab3" * 11 + "/pairs.jsonl",
        "hub/ghp_" + "Ab3" * 12,
        "runs/AKIA" + "A2" * 8,
    ],
)
def test_a_signed_address_or_a_token_is_a_secret_wherever_it_stands(
    value: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["sft", "--model.path", value, "--data.train", "d", "--run.dir", "r"]) == 2
    assert "--model.path: holds a password or a token" in capfd.readouterr().err
    config = sft_config(folder, "run")
    config = replace(config, data=replace(config.data, eval=value))
    with pytest.raises(ValueError, match=r"^data\.eval: holds a password or a token"):
        train_sft(config)
    assert not (folder / "run").exists()
    run = attacked_run(folder, value)
    assert main(["report", str(run), "--out", str(folder / "report.html")]) == 0
    said = "".join(capfd.readouterr()) + (folder / "report.html").read_text()
    secret = max(re.findall(r"[A-Za-z0-9_]{13,}", value), key=len)
    assert secret not in said.replace("base64", "")


def test_errors_mask_addresses_and_the_environment_s_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_JUDGE_API_KEY", SECRET)
    monkeypatch.setenv("SHORT_TOKEN", "the")
    assert masked(f"no answer from https://a:b@host:1/x?api_key=c&n=3 ({SECRET})") == (
        "no answer from https://***@host:1/x?api_key=***&n=3 ([MY_JUDGE_API_KEY])"
    )
    plain = "see https://host/@user/the?tokens_per_batch=3, mail me@here.example"
    assert masked(plain) == plain
    monkeypatch.setenv("OTHER_TOKEN", "8-digits")  # the shortest that is looked for
    assert masked("8-digits") == "[OTHER_TOKEN]"

    def fail(argv: list[str]) -> int:
        raise ValueError(f"cannot read {ADDRESSES[0]}: {SECRET} was refused")

    monkeypatch.setattr("fastalign.cli.doctor.main", fail)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == (
        "fastalign doctor: cannot read https://***@data.example/pairs.jsonl: [MY_JUDGE_API_KEY] "
        "was refused\n"
    )


def test_a_judge_s_key_is_sent_and_nowhere_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    for name, answer in (("a", " good"), ("b", " dim")):
        rows = [{"prompt": f"The {word}", "completion": answer} for word in WORDS[:3]]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    with judge_server(lambda question, number: chat("A")) as served:
        arguments = ["win-rate", "--model.samples", "a.jsonl", "--baseline.samples", "b.jsonl"]
        arguments += ["--judge.endpoint", served.url, "--judge.model", "judge", "--out", "win.json"]
        assert main([*arguments, "--judge.key-variable", "JUDGE_KEY"]) == 0
        sent = {headers["authorization"] for _, headers, _ in served.requests}
        assert sent == {f"Bearer {SECRET}"}
        out, err = capfd.readouterr()
        assert SECRET not in out + err + texts_under(tmp_path)
        monkeypatch.delenv("JUDGE_KEY")
        arguments[-1] = "again.json"
        # The key itself in place of its variable's name, of which nothing knows that it is one.
        assert main([*arguments, "--judge.key-variable", SECRET]) == 2
    out, err = capfd.readouterr()
    assert "the environment has no variable of that name" in err
    assert SECRET not in out + err + texts_under(tmp_path)


def test_a_server_s_address_has_no_password() -> None:
    for url in ("http://me:word@host:8000", "http://host:8000?token=word"):
        with pytest.raises(ValueError, match="expected an address without user") as caught:
            VllmOptions(url=url)
        assert "word" not in str(caught.value).replace("password", "")


def test_a_server_listens_to_this_machine_unless_told() -> None:
    command = server_command(VllmServerConfig(ServedModel("m")))
    assert command[command.index("--host") + 1] == "127.0.0.1"
    hosts = ("127.0.0.1", "127.0.0.2", "localhost", "::1", "0.0.0.0", "::", "", "192.0.2.1")
    assert [is_loopback(host) for host in hosts] == [True] * 4 + [False] * 4


@pytest.mark.parametrize(("host", "warns"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_a_server_s_token_is_in_a_file_for_this_user_and_who_listens_is_warned_of(
    host: str,
    warns: bool,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started: list[list[str]] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.delenv("FASTALIGN_VLLM_TOKEN", raising=False)
    file = folder / "cache/fastalign/vllm-server-8000.token"

    def supervise(command: list[str], engine: str) -> int:
        token = file.read_text().strip()
        assert file.stat().st_mode & 0o777 == 0o600
        assert os.environ["FASTALIGN_VLLM_TOKEN"] == token != ""
        assert token not in " ".join(command)
        monkeypatch.delenv("FASTALIGN_VLLM_TOKEN")
        assert find_token("http://localhost:8000", None) == token
        assert find_token("http://localhost:8001", None) is None
        assert find_token("http://192.0.2.1:8000", None) is None  # never sent elsewhere
        assert find_token("http://192.0.2.1:8000", str(file)) == token
        started.append(command)
        return 7

    monkeypatch.setattr(vllm_server, "require_vllm", lambda: None)
    monkeypatch.setattr(vllm_server, "supervise", supervise)
    monkeypatch.setattr(vllm_server, "check_port", lambda host, port: None)
    for name in ("VLLM_SERVER_DEV_MODE", "OMP_WAIT_POLICY", "TORCHDYNAMO_DISABLE"):
        monkeypatch.setenv(name, "1")
    assert main(["vllm-server", "--model.path", str(folder / "llama"), "--host", host]) == 7
    assert not file.exists()
    assert started[0][started[0].index("--host") + 1] == host
    said = capsys.readouterr().err
    assert ("its token and the prompts come over plain HTTP" in said) == warns
    assert said.count("\n") == int(warns)


def test_a_token_is_given_by_the_environment_or_a_file_that_others_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = VllmServerConfig(ServedModel("m"), token_file=str(tmp_path / "token"))
    monkeypatch.setenv("FASTALIGN_VLLM_TOKEN", "given")
    with server_token(config) as (token, place):
        assert (token, place) == ("given", "FASTALIGN_VLLM_TOKEN")
    assert find_token("http://192.0.2.1:8000", None) == "given"
    monkeypatch.setenv("FASTALIGN_VLLM_TOKEN", "two words")
    with pytest.raises(ValueError, match="FASTALIGN_VLLM_TOKEN: expected one word of ASCII"):
        find_token("http://192.0.2.1:8000", None)
    monkeypatch.delenv("FASTALIGN_VLLM_TOKEN")
    file = tmp_path / "token"
    file.write_text("of-the-file\n")
    for read in (lambda: find_token("http://h:1", str(file)), server_token(config).__enter__):
        file.chmod(0o640)
        with pytest.raises(ValueError, match=r"token_file: other users can read .*chmod 600"):
            read()
        file.chmod(0o600)
    with server_token(config) as (token, _):
        assert token == find_token("http://h:1", str(file)) == "of-the-file"
    assert file.read_text() == "of-the-file\n"  # the user's, and left alone


# Fails on any connection or name that is looked up, and says so in a file, whoever catches it.
GUARD = """
import os, socket, sys
def refuse(*arguments, **named):
    with open(os.environ["SEEN"], "a") as seen:
        seen.write(repr(arguments[-1:]) + "\\n")
    raise OSError("no connection is expected")
socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
socket.getaddrinfo = socket.gethostbyname = refuse
if sys.argv[1] == "try":
    import urllib.request
    try:
        urllib.request.urlopen("http://127.0.0.1:9")
    except OSError:
        pass
    sys.exit(0)
from fastalign.cli.main import main
for line in sys.stdin.read().splitlines():
    if main(line.split()):
        sys.exit(f"failed: {line}")
assert "transformers" in sys.modules
from huggingface_hub import constants
assert constants.HF_HUB_DISABLE_TELEMETRY and not constants.HF_HUB_OFFLINE
"""


def guarded(*arguments: str, commands: list[str], place: Path) -> str:
    """What a process tried to connect to while it ran the commands."""
    seen = place / "seen"
    seen.write_text("")
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", *QUIET)
    environment = {name: text for name, text in os.environ.items() if name not in offline}
    environment |= {"SEEN": str(seen), "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", GUARD, *arguments],
        input="\n".join(commands),
        cwd=place,
        env=environment | {"HF_HOME": str(place / "hf"), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return seen.read_text()


def test_the_guard_sees_a_connection(tmp_path: Path) -> None:
    assert guarded("try", commands=[], place=tmp_path) != ""


def test_nothing_is_connected_to_in_runs_on_local_files(tmp_path: Path) -> None:
    write_rows(tmp_path / "texts.jsonl", [{"text": "The" + sentence(n, 5)} for n in range(20)])
    rows = [{"prompt": f"The {word}", "chosen": " good", "rejected": " dim"} for word in WORDS]
    write_rows(tmp_path / "pairs.jsonl", rows)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"The {word}"} for word in WORDS])
    few = "--train.max-steps 2 --train.batch-size 4"
    commands = [
        "new-model --data.train texts.jsonl --vocab-size 300 --hidden-size 16 --layers 1 --heads 2 "
        "--out base",
        f"sft --model.path base --data.train texts.jsonl {few} --run.dir runs/sft",
        f"dpo --model.path runs/sft/model --data.train pairs.jsonl {few} --run.dir runs/dpo",
        "eval --model.path runs/dpo/model --reference.path base --data.prompts prompts.jsonl "
        "--sampling.max-new-tokens 3 --out runs/dpo/eval/eval.json",
        "report runs/sft runs/dpo --out report.html",
        "doctor --device cpu",
    ]
    assert guarded("run", commands=commands, place=tmp_path) == ""


# Of SVG too, what could run something or fetch it.
DANGEROUS = (
    *("iframe", "object", "embed", "base", "foreignobject", "animate", "set", "use", "image"),
)


class Page(HTMLParser):
    """The tags of a page, and whether any could run something or fetch it.

    The package's own scripts may run, by their hashes in the page's policy, and nothing else.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.dangerous: list[str] = []
        self._is_script = False
        self._policy = ""
        self.feed(text)

    def handle_data(self, data: str) -> None:
        hashed = base64.b64encode(hashlib.sha256(data.encode()).digest()).decode()
        own = data in (static("uPlot.iife.min.js"), static("report.js"))
        if self._is_script and not (own and f"'sha256-{hashed}'" in self._policy):
            self.dangerous.append(f"script {data:.60}")

    def handle_endtag(self, tag: str) -> None:
        self._is_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        links = [v or "" for name, v in attrs if name in ("src", "href", "xlink:href", "action")]
        self._is_script = tag == "script" and found.get("type") != "application/json"
        if found.get("http-equiv") == "Content-Security-Policy":
            self._policy = found["content"] or ""
        if (
            tag in DANGEROUS
            or any(name.startswith("on") for name, _ in attrs)
            or any(not link.startswith(("#main", "data:,")) for link in links)
        ):
            self.dangerous.append(f"{tag} {attrs}")


def attacked_run(place: Path, attack: str = ATTACK, name: str = OF_A_NAME) -> Path:
    """A run whose every text is an attack: names, settings, samples, measures."""
    run = place / name
    (run / "eval").mkdir(parents=True)
    config = {attack: attack, "run": {"dir": attack}, "loss": {"name": attack, "beta": attack}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    row: dict[str, Any] = {"step": 1, "loss": attack, "collapsed": attack, "step_seconds": 1.0}
    write_rows(run / "metrics.jsonl", [row, {"step": 2, "loss": 1.0, attack: 1.0}])
    measures = {"reward": 1.0, "reward_se": attack, "kl": 2.0, "collapsed": attack}
    (run / "eval/eval.json").write_text(json.dumps(measures))
    turns = [{"role": attack, "content": attack}]
    sample = {"completion": attack, "finish_reason": attack, "reward": attack}
    samples = [{"prompt": attack, **sample}, {"prompt": turns, **sample}]
    write_rows(run / "eval/samples.jsonl", samples)
    return run


def test_pages_run_nothing_that_models_and_data_wrote(tmp_path: Path) -> None:
    run = attacked_run(tmp_path)
    for command in ("report", "frontier"):
        out = tmp_path / f"{command}.html"
        assert main([command, str(run), "--out", str(out)]) == 0
        page = out.read_text()
        assert Page(page).dangerous == []
        assert "&lt;script&gt;alert(1)" in page
    report = (tmp_path / "report.html").read_text()
    assert report.count("&lt;script&gt;alert(1)") >= 7
    assert "&lt;img src=x onerror=alert(3)&gt;" in report
    words = re.sub(r"<(script|style|svg).*?</\1>", "", report, flags=re.DOTALL)
    assert "49" not in words.split("<h2>Samples</h2>")[1]
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', report)
    assert policy
    assert "default-src 'none'" in policy[1]
    assert "unsafe" not in policy[1].replace("style-src 'unsafe-inline'", "")


def test_the_test_of_pages_finds_what_it_looks_for() -> None:
    for text in (ATTACK, OF_A_NAME, "<a href='javascript:x'>", "<link href='https://cdn.example'>"):
        assert Page(text).dangerous


CONTROLS = "a\x1b]0;title\x07\x1b[2J\r\x9b31m\u202egnp.exe\u2066\u200b"
SHOWN = r"a\x1b]0;title\x07\x1b[2J\r\x9b31m\u202egnp.exe\u2066\u200b"


def unsafe(text: str) -> set[str]:
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl")} - {"\n", "\t"}


def test_control_characters_are_visible_and_joiners_and_words_are_kept() -> None:
    assert visible(CONTROLS) == SHOWN
    assert unsafe(CONTROLS) == set(CONTROLS) & set("\x1b\x07\r\x9b\u202e\u2066\u200b")
    plain = "caf\u00e9 \U0001f469\u200d\U0001f52c \u0645\u06cc\u200c\u062e\u0648\tx\n\u65e5"
    assert visible(plain) == plain


def test_no_control_character_of_names_rows_templates_or_files_is_printed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raises = "{{ raise_exception(messages[0]['content']) }}"
    config = json.loads((folder / "llama/tokenizer_config.json").read_text())
    config["chat_template"] = raises
    (folder / "llama/tokenizer_config.json").write_text(json.dumps(config))
    (folder / "llama/chat_template.jinja").write_text(raises)
    turns = [{"role": "user", "content": CONTROLS}, {"role": "assistant", "content": "b"}]
    chat = write_rows(folder / "chat.jsonl", [{"messages": turns}])
    named = write_rows(folder / f"{CONTROLS.replace('/', '')}.jsonl", [{CONTROLS: 1}])
    (folder / "run.yaml").write_text(json.dumps({CONTROLS: 1, "run": {CONTROLS: CONTROLS}}))
    run = attacked_run(folder, CONTROLS, CONTROLS)
    for command in (
        ["data", "check", str(chat), "--tokenizer", str(folder / "llama")],
        ["data", "check", str(named)],
        ["data", "check", CONTROLS],
        ["sft", "--config", str(folder / "run.yaml")],
        [CONTROLS],
        ["sft", CONTROLS],
        ["sft", f"--{CONTROLS}", "1"],
        ["report", str(run), "--out", str(folder / "report.html")],
        ["report", str(folder / CONTROLS / "none")],
    ):
        main(command)
        out, err = capsys.readouterr()
        assert unsafe(out + err) == set(), command
        assert "\\x1b" in out + err or "\\\\x1b" in out + err, command
    page = (folder / "report.html").read_text()
    assert unsafe(page) == set()
    assert page.count(SHOWN) >= 4
    assert "default-src 'none'" in page.split("<title>")[0]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal_passes_on_no_control_character(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with redirect_stdout(terminal), safe_output():
        with ProgressDisplay("sft", 4, 0) as display:
            print(f"printed {CONTROLS}")
            display.say(f"said {CONTROLS}")
            display.update({"step": 1, "loss": 0.5, "tokens_per_second": 10.0})
        print("behind it")
    text = terminal.getvalue()
    assert "\x1b[" in text  # of the bar
    assert text.count(SHOWN.partition("[2J")[0]) == 2
    assert "behind it" in text
    assert not set(text) & set(CONTROLS) - set("a\x1b\r") & unsafe(CONTROLS)


def test_an_error_that_is_not_expected_is_shown_safely_too() -> None:
    code = f"""
import sys
from fastalign.cli import doctor, main
def fail(argv):
    raise KeyError({CONTROLS!r})
doctor.main = fail
sys.argv = ["fastalign", "doctor"]
main.console()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert unsafe(done.stderr) == set()


def test_closed_standard_streams_take_no_file_and_end_no_command(tmp_path: Path) -> None:
    code = (
        "from fastalign.output import occupy_standard_descriptors as occupy; occupy();"
        "import sys; file = open(sys.argv[1], 'w'); print('lost'); file.write(str(file.fileno()))"
    )
    shell = f'"{sys.executable}" "$@" <&- >&- 2>&-'
    for arguments in (["-c", code, str(tmp_path / "out")], ["-m", "fastalign", "--version"]):
        done = subprocess.run(["bash", "-c", shell, "bash", *arguments], cwd=ROOT)
        assert done.returncode == 0
    assert int((tmp_path / "out").read_text()) > 2
