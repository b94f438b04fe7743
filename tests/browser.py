"""A real Chromium for tests of pages, and a server on a thread.

Chromium comes from the distribution (`apt-get install chromium`), or from CHROMIUM; tests that need
it are skipped where there is none.
"""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fastalign.cli.compare.serve import bound_socket

CHROMIUM = (
    os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium: apt-get install chromium, or set CHROMIUM"
)


@contextmanager
def launched() -> Iterator[Any]:
    """A browser."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@contextmanager
def served(application_of: Callable[[int], Any]) -> Iterator[str]:
    """The origin of an application, by uvicorn on a thread."""
    uvicorn = pytest.importorskip("uvicorn")
    with bound_socket("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        config = uvicorn.Config(
            application_of(port), log_level="warning", timeout_graceful_shutdown=3
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()


def opened(browser: Any, link: str, width: int = 1280, **options: Any) -> Any:
    """A page; what it asks of elsewhere, or complains of, is in `page.problems`."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    context.set_default_timeout(20_000)
    page = context.new_page()
    origin = link.partition("/?")[0]
    page.problems = []
    page.on("console", lambda m: page.problems.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on(
        "request",
        lambda r: (
            None if r.url.startswith((origin, "data:")) else page.problems.append(f"asks {r.url}")
        ),
    )
    page.goto(link)
    return page


def ready(page: Any, selector: str) -> None:
    """Wait for an element and for the page's scripts: a key that comes before them is lost."""
    page.wait_for_selector(selector)
    page.wait_for_load_state("load")


def said(page: Any, text: str) -> None:
    """Wait until the page's status says a text."""
    page.wait_for_function(
        "text => document.getElementById('status').textContent.includes(text)", arg=text
    )


def violations(page: Any) -> str:
    """What axe-core finds, in words; empty if nothing."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(page)
    return found.generate_report() if found.violations_count else ""
