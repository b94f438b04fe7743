"""Read before any test module: Triton kernels run interpreted, unless a GPU is asked for.

Triton reads TRITON_INTERPRET when a kernel is decorated, so a process runs either the interpreter
or a GPU: `FASTALIGN_TEST_GPU=1 pytest tests/gpu` is the second.
"""

import gc
import json
import os
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

if os.environ.get("FASTALIGN_TEST_GPU") != "1":
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

HERE = Path(__file__).parent
# Seconds that each file takes; ./scripts/test.sh --record-durations rewrites it.
DURATIONS = HERE / "durations.json"
SLOW_SECONDS = 10.0
# Files whose tests ask the same servers, each of which takes long to start: one process runs them.
SHARE_SERVERS = ("rollouts/test_vllm_server.py", "trainers/sampling/test_vllm_runs.py")
measured: dict[str, float] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-durations", action="store_true", help=f"rewrite {DURATIONS.name}")


@cache
def name_of(path: Path) -> str:
    """Return a file's name below this folder, as durations.json has it."""
    return path.relative_to(HERE).as_posix()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file comes first: at the end no process works on one alone.

    Tests of files that take long are marked `slow`, which `./scripts/test.sh --quick` leaves out.
    Those that interpret Triton's kernels are skipped where the interpreter itself fails.
    """
    seconds = json.loads(DURATIONS.read_text(encoding="utf-8"))

    def of_file(item: pytest.Item) -> float:
        return float(seconds.get(name_of(item.path), 0.0))

    def of_process(item: pytest.Item) -> float:
        if name_of(item.path) in SHARE_SERVERS:
            return float(sum(seconds.get(name, 0.0) for name in SHARE_SERVERS))
        return of_file(item)

    items.sort(key=of_process, reverse=True)
    for item in items:
        if of_file(item) > SLOW_SECONDS:
            item.add_marker(pytest.mark.slow)
    if os.environ.get("TRITON_INTERPRET") == "1":
        skip_interpreted(items)


def skip_interpreted(items: list[pytest.Item]) -> None:
    from tests.interpreter import interpreter_failure, is_interpreted

    interpreted = [item for item in items if is_interpreted(item)]
    reason = interpreter_failure() if interpreted else None
    if reason is not None:
        for item in interpreted:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The files that share servers count as one."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByServers(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scope: str = super()._split_scope(nodeid)
            return SHARE_SERVERS[0] if scope.removeprefix("tests/") in SHARE_SERVERS else scope

    return ByServers(config, log)


@pytest.fixture(scope="session")
def vllm_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Up to two servers of vLLM, started when a test first asks for one of them."""
    from tests.rollouts.vllm_cases import Servers, nothing_left_in_shared_memory

    with nothing_left_in_shared_memory():
        servers = Servers(tmp_path_factory.mktemp("served"))
        yield servers
        servers.stop()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.location[0].removeprefix("tests/")
    measured[name] = measured.get(name, 0.0) + report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    is_worker = hasattr(session.config, "workerinput")
    if session.config.getoption("--record-durations") and not is_worker:
        found = {name: round(n) for name, n in sorted(measured.items()) if n >= 1}
        DURATIONS.write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Modules and tests are kept: no collection of garbage need look at them, now or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """An engine of vLLM thaws them when it is closed."""
    file_ends = nextitem is not None and nextitem.path != item.path  # counting takes a while
    if file_ends and not gc.get_freeze_count():
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries count what is left behind at the end


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set of the CPU library in turn, which native code then takes."""
    from fastalign.ops import native_library  # heavy, and most tests need none

    if request.param not in native_library.cpu_isas():
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("FASTALIGN_CPU_ISA", request.param)
    name: str = request.param
    return name
