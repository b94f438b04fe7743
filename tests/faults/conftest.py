"""Fixtures of the fault table."""

from collections.abc import Iterator

import pytest

from tests.faults.real import HEARD, Stage
from tests.small_runs import fill


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("faults")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        yield Stage(fill(folder))


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    """A name that no other test's run has."""
    name = f"{request.path.stem.removeprefix('test_')} {request.node.name.removeprefix('test_')}"
    return "".join(c if c.isalnum() else "-" for c in name)


@pytest.fixture(autouse=True)
def _runs_say_what_the_row_quotes(request: pytest.FixtureRequest) -> Iterator[None]:
    HEARD.clear()
    yield
    said = "\n".join(HEARD)
    assert not request.function.row.unsaid(said), said
