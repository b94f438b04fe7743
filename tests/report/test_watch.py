"""`fastalign report --watch`: who sees it, its version, and a run that has written nothing yet."""

import json
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from fastalign.cli.compare import serve
from fastalign.cli.main import main
from fastalign.compare.app import application
from fastalign.report.page import render
from fastalign.report.runs import read_run
from fastalign.report.watch import version_of, watched
from tests.compare.site import HOST


def put_run(folder: Path) -> Path:
    (folder / "run").mkdir()
    (folder / "run/config.yaml").write_text("{}")
    return folder / "run"


def grow(run: Path, **row: Any) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_the_page_is_read_again_when_a_file_changes_and_only_then(tmp_path: Path) -> None:
    run, versions = put_run(tmp_path), list[str]()

    def read(version: str) -> str:
        versions.append(version)
        return render([read_run(run)], watch=version)

    site = watched([str(run)], read)
    with TestClient(application(site, ["127.0.0.1"], 7860), base_url=HOST) as client:
        for method, path in (("GET", "/"), ("POST", "/version")):
            assert client.request(method, path, headers={"origin": HOST}).status_code == 403
        assert client.get("/", params={"key": site.keys.owner.key}).status_code == 200
        early = client.get("/")
        assert "No report yet" in early.text
        assert "no metrics.jsonl" in early.text
        assert early.headers["refresh"] == "3"
        grow(run, step=1, loss=0.5)
        page = client.get("/")
        assert page.text == client.get("/").text
        assert versions[1:] == [version_of([str(run)])]
        assert f'data-watch="{versions[-1]}"' in page.text
        policy = page.headers["content-security-policy"]
        assert "connect-src 'self'" in policy
        assert f'content="{policy}"' in page.text
        assert page.headers["x-frame-options"] == "DENY"
        told = client.post("/version", headers={"origin": HOST}).text
        assert told == versions[-1]
        grow(run, step=2, loss=0.25)
        assert client.post("/version", headers={"origin": HOST}).text != told
        assert '"y":[0.5,0.25]' in client.get("/").text
        elsewhere = {"origin": "http://elsewhere.example"}
        assert client.post("/version", headers=elsewhere).status_code == 403


def test_a_report_in_a_file_asks_no_server(tmp_path: Path) -> None:
    run = put_run(tmp_path)
    grow(run, step=1, loss=0.5)
    page = render([read_run(run)])
    assert "connect-src 'none'" in page
    assert "data-watch=" not in page


def test_the_command_serves_until_it_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = put_run(tmp_path)
    grow(run, step=1, loss=0.5)
    printed, wrong, link = serve.print_links, list[BaseException](), list[str]()

    def visit() -> None:
        try:
            with httpx2.Client(base_url=link[0].partition("?")[0]) as client:
                client.get(f"/?{link[0].partition('?')[2]}").raise_for_status()
                assert "fastalign report" in client.get("/").text
        except BaseException as error:
            wrong.append(error)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=visit)

    def print_links(config: Any, port: int, keys: Any) -> None:
        printed(config, port, keys)
        link.append(f"http://127.0.0.1:{port}/?key={keys.owner.key}")
        thread.start()

    monkeypatch.setattr(serve, "print_links", print_links)
    assert main(["report", str(run), "--watch", "--port", "0"]) == 0
    thread.join()
    assert wrong == []
    assert re.search(r"^http://127\.0\.0\.1:\d+/\?key=", capsys.readouterr().out, re.MULTILINE)
    assert not (tmp_path / "report.html").exists()
    assert main(["report", str(tmp_path / "none"), "--watch"]) == 2
    assert "none: no such folder or database" in capsys.readouterr().err
