"""The report of runs that train, served to this machine and rendered anew as their files change."""

import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from fastalign.compare.access import Keys
from fastalign.compare.app import Handler, Site
from fastalign.compare.page import Pages
from fastalign.compare.store import Annotator
from fastalign.report.page import page_policy

# Of a run's folder; a database of comparisons also writes to a file of its own beside it.
WATCHED = ("config.yaml", "metrics.jsonl", "samples.jsonl", "eval/eval.json", "eval/samples.jsonl")
NOT_YET = 3  # seconds after which a page without a report looks again


@dataclass
class Rendered:
    """The last page, and the version of the files that it is of."""

    version: str = ""
    page: str = ""


@dataclass(frozen=True, kw_only=True)
class Watched(Site):
    """The site of a report.

    Attributes:
        paths: run folders and databases of comparisons.
        render: reads them and returns the page of a version.
        last: the last page.
    """

    paths: Sequence[str]
    render: Callable[[str], str]
    last: Rendered = field(default_factory=Rendered)

    def handlers(self) -> tuple[Handler, Mapping[str, Handler]]:
        """Return what shows the page, and what tells its version."""
        return show_report, {"/version": tell_version}

    def page(self) -> str:
        """Return the page of the files as they are.

        Raises:
            ValueError: if a file is damaged.
            FileNotFoundError: if a run has written nothing yet.
        """
        version = version_of(self.paths)
        if version != self.last.version:
            self.last.page = self.render(version)
            self.last.version = version
        return self.last.page


def version_of(paths: Sequence[str]) -> str:
    """Return a text that changes with the files of runs and databases."""
    found = hashlib.sha256()
    for path in paths:
        whole = (Path(path), Path(f"{path}-wal"), *(Path(path) / name for name in WATCHED))
        for file in whole:
            with suppress(OSError):  # not there, or not yet
                at = file.stat()
                if file.is_file():
                    found.update(f"{file} {at.st_mtime_ns} {at.st_size}\n".encode())
    return found.hexdigest()[:16]


def watched(paths: Sequence[str], render: Callable[[str], str]) -> Watched:
    """Return the site on the report of these paths, with a new key."""
    me = Annotator(0, "me", secrets.token_urlsafe(32))
    pages = Pages("fastalign report", home="Report")

    def no_results() -> str:
        return pages.render("refused", heading="Report", text="The report is the first page.")

    keys = Keys([me], me)
    return Watched(pages=pages, keys=keys, results=no_results, paths=paths, render=render)


async def show_report(site: Watched, person: Annotator, request: Request) -> Response:
    """Show the report as it is now."""
    try:
        page = await run_in_threadpool(site.page)
    except (ValueError, OSError) as error:
        page = site.pages.render("refused", heading="No report yet", text=str(error))
        return HTMLResponse(page, headers={"Refresh": str(NOT_YET)})
    return HTMLResponse(page, headers={"Content-Security-Policy": page_policy(page)})


async def tell_version(site: Watched, person: Annotator, request: Request) -> Response:
    """Return the version of the files."""
    return PlainTextResponse(version_of(site.paths))
