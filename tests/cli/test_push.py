"""`fastalign push` sends a written folder's files, and no other, to an endpoint of this machine."""

import base64
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _detect_agent

from fastalign.cli.main import QUIET, main
from fastalign.written_files import MANIFEST, written_folder

TOKEN = "hf_" + "abCD" * 8


class Hub:
    """The hub's API for one repository, without LFS."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str | None]] = []
        self.created: dict[str, Any] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.is_public = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def answer(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(size)
                hub.requests.append((self.path, self.headers.get("Authorization")))
                code, found = hub.answer(self.path, body)
                content = json.dumps(found).encode()
                self.send_response(code)
                if code == 404:
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        api = "/api/models/me/mine"
        if path == api and self.is_public:
            return 200, {"id": "me/mine", "private": False}
        if path == "/api/repos/create":
            self.created = json.loads(body)
            return 200, {"url": f"{self.address}/me/mine"}
        if path.startswith(f"{api}/branch/") or path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path.startswith(f"{api}/preupload/"):
            files = json.loads(body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": file["path"], **modes} for file in files]}
        if path.startswith(f"{api}/commit/"):
            values = [json.loads(line)["value"] for line in body.splitlines()]
            files = [value for value in values if "path" in value]
            self.commits[path.rsplit("/", 1)[1]] = {
                file["path"]: base64.b64decode(file["content"]) for file in files
            }
            address = f"{self.address}/me/mine/commit/abc"
            return 200, {"success": True, "commitUrl": address, "commitOid": "abc"}
        return 404, {"error": "nothing here"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    thread = Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", "/dev/null/none")  # no cache of it
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.server.shutdown()
    thread.join()
    hub.server.server_close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    with written_folder(tmp_path / "run/model") as aside:
        aside.mkdir()
        (aside / "config.json").write_text("{}")
        (aside / "README.md").write_text("---\ntags: [fastalign]\n---\n")
        (aside / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "run/model"


def test_what_the_manifest_lists_is_sent_in_one_commit(
    hub: Hub, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(model), "me/mine", "--private", "--revision", "v1"]) == 0
    out, err = capfd.readouterr()
    assert hub.commits == {"v1": {path.name: path.read_bytes() for path in model.iterdir()}}
    assert MANIFEST in hub.commits["v1"]
    assert hub.created["name"] == "mine"
    assert hub.created.get("private", hub.created.get("visibility") == "private")
    assert f"{hub.address}/me/mine/commit/abc" in out
    without = {path for path, token in hub.requests if token != f"Bearer {TOKEN}"}
    assert without <= {"/api/validate-yaml", "/api/agent-harnesses"}  # of no repository
    assert TOKEN not in out + err
    assert main(["push", str(model), "me/mine"]) == 0
    assert hub.commits.keys() == {"v1", "main"}
    assert not {"private", "visibility"} & hub.created.keys()


@pytest.mark.parametrize("switched_off", [True, False])
def test_the_hub_is_asked_for_its_list_of_agents_only_with_telemetry(
    switched_off: bool, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_detect_agent, "_registry", None)
    # Which huggingface_hub reads when it is imported, after a command has set it.
    assert "HF_HUB_DISABLE_TELEMETRY" in QUIET
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", switched_off)
    assert main(["push", str(model), "me/mine"]) == 0
    asked = [path for path, _ in hub.requests if path == "/api/agent-harnesses"]
    assert len(asked) == (0 if switched_off else 1)


def test_a_dry_run_lists_files_and_asks_nothing(
    hub: Hub, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(model), "me/mine", "--dry-run"]) == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    assert ["7", "model.safetensors"] in lines
    total = sum(path.stat().st_size for path in model.iterdir())
    assert [str(total), "bytes", "in", "4", "files,", "for", "me/mine"] in lines
    assert hub.requests == []


def test_an_adapter_on_a_folder_of_this_machine_is_said(
    tmp_path: Path, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with written_folder(tmp_path / "adapter") as aside:
        aside.mkdir()
        names = {"base_model_name_or_path": str(model)}
        (aside / "adapter_config.json").write_text(json.dumps(names))
    assert main(["push", str(tmp_path / "adapter"), "me/mine", "--dry-run"]) == 0
    assert f"names its base as {model}, a folder of this machine" in capfd.readouterr().out


def test_a_public_repository_is_not_sent_to_where_a_private_one_is_wanted(
    hub: Hub, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.is_public = True
    assert main(["push", str(model), "me/mine", "--private"]) == 2
    assert "me/mine exists and is public; nothing was sent" in capfd.readouterr().err
    assert [path for path, _ in hub.requests] == ["/api/models/me/mine"]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda m: (m / "config.json").write_text("[]"), "config.json was changed since"),
        (lambda m: (m / "notes.txt").write_text("mine"), "notes.txt was added since"),
        (lambda m: (m / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda m: (m / MANIFEST).unlink(), "is unfinished, or fastalign did not write it"),
        (lambda m: (m / MANIFEST).write_text('{"run":'), "is unfinished, or fastalign did not"),
    ],
    ids=["changed", "added", "missing", "unfinished", "damaged"],
)
def test_a_folder_that_is_not_as_it_was_written_is_refused(
    change: Any, line: str, hub: Hub, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change(model)
    assert main(["push", str(model), "me/mine"]) == 2
    err = capfd.readouterr().err
    assert line in err
    assert err.count("\n") == 1
    assert hub.requests == []


def test_each_mistake_is_one_line(
    hub: Hub, model: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*arguments: str) -> str:
        assert main(["push", *arguments]) == 2
        err = capfd.readouterr().err
        assert err.count("\n") == 1
        return err

    assert "send a folder in it (model)" in said(str(model.parent), "me/mine")
    assert "is no folder" in said(str(model / "config.json"), "me/mine")
    assert "Repo id must" in said(str(model), "me/mine/model")
    assert "404" in said(str(model), "me/other")
    hub.server.server_close()
    assert hub.address in said(str(model), "me/mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in said(str(model), "me/mine")
