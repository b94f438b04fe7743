"""What the command line sets for its process: threads, waiting at barriers, the allocator."""

import os
import subprocess
import sys
import threading
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastalign import process
from fastalign.process import Choice, Place, ShortSpins, Spins, choose, cpu_quota, waits_by_load

TWO = Place(2)
SPINS = "OpenMP's threads spin; once other work holds their cores they sleep, until it has not"


@pytest.mark.parametrize(
    ("place", "environment", "num_threads", "reason"),
    [
        (TWO, {}, None, "torch's own number"),
        (Place(8, quota=2.5), {}, 2, "the container's quota is 2.5 cores"),
        (Place(8, quota=0.5), {}, 1, "the container's quota is 0.5 cores"),
        (Place(2, quota=2), {}, None, "torch's own number"),
        (Place(8, quota=2), {"OMP_NUM_THREADS": "4"}, None, "OMP_NUM_THREADS=4"),
        (Place(8, quota=2), {"MKL_NUM_THREADS": "3"}, None, "MKL_NUM_THREADS=3"),
    ],
)
def test_threads_are_those_of_the_quota_unless_they_are_set(
    place: Place, environment: dict[str, str], num_threads: int | None, reason: str
) -> None:
    choice = choose(place, environment)
    assert (choice.num_threads, choice.threads) == (num_threads, reason)


@pytest.mark.parametrize(
    ("place", "environment", "reason"),
    [
        (TWO, {"OMP_WAIT_POLICY": "ACTIVE"}, "OMP_WAIT_POLICY=ACTIVE"),
        (TWO, {"GOMP_SPINCOUNT": "9"}, "GOMP_SPINCOUNT=9"),
        (TWO, {"OMP_NUM_THREADS": "1"}, "one thread waits for no other"),
        (Place(1), {}, "one thread waits for no other"),
        (Place(8, quota=1), {}, "one thread waits for no other"),
        (Place(16), {"OMP_NUM_THREADS": "7"}, "as OpenMP does: half of the cores are free"),
        (Place(16), {"OMP_NUM_THREADS": "8"}, None),
        (Place(16), {"OMP_NUM_THREADS": "2", "LOCAL_WORLD_SIZE": "4"}, None),
        (Place(2, tells_delay=False), {}, "as OpenMP does: the system does not tell"),
        (TWO, {}, None),
    ],
)
def test_threads_that_could_hold_each_other_up_adapt(
    place: Place, environment: dict[str, str], reason: str | None
) -> None:
    choice = choose(place, environment)
    assert choice.adapts == (reason is None)
    assert choice.waiting.startswith(reason or SPINS)


@pytest.mark.parametrize(
    ("allocator", "environment", "reason"),
    [
        ("glibc", {}, None),
        ("glibc", {"MALLOC_ARENA_MAX": "2"}, "glibc with MALLOC_ARENA_MAX=2"),
        ("glibc", {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1"}, "glibc with GLIBC_TUNABLES"),
        ("glibc", {"WORLD_SIZE": "2"}, "glibc as it is: ranks share"),
        ("glibc", {"WORLD_SIZE": "1", "GLIBC_TUNABLES": "glibc.cpu.x=1"}, None),
        ("jemalloc", {}, "jemalloc, left as it is"),
        ("", {}, "not glibc, left as it is"),
    ],
)
def test_glibc_keeps_memory_unless_the_user_chose(
    allocator: str, environment: dict[str, str], reason: str | None
) -> None:
    choice = choose(Place(2, allocator=allocator), environment)
    assert choice.keeps_memory == (reason is None)
    assert choice.allocator.startswith(reason or "glibc, told to keep freed blocks")


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        ("0::/a/b", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "max 100000"}, 1.0),
        ("0::/of/the/host", {"cpu.max": "200000 100000"}, 2.0),
        (
            "4:cpu,cpuacct:/a\n0::/",
            {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("3:cpuset:/", {"cpu/cpu.cfs_quota_us": "1", "cpu/cpu.cfs_period_us": "1"}, None),
        ("0::/", {}, None),
    ],
)
def test_the_smallest_quota_of_the_groups_is_found(
    own: str, files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    (tmp_path / "own").write_text(own + "\n")
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert cpu_quota(tmp_path / "own", tmp_path / "mount") == quota
    assert cpu_quota(tmp_path / "nothing") is None


def test_spins_are_short_from_a_delay_on_until_there_was_none_for_long() -> None:
    spins = Spins()
    assert [spins.check(0.01, 0.0), spins.check(0.9, 0.25), spins.check(0.3, 0.5)] == [0, 1, 1]
    # Checks without a delay between others end nothing: beside other work some have none.
    assert [spins.check(0.01, 10.25), spins.check(0.2, 10.4), spins.check(0.01, 20.25)] == [1, 1, 1]
    assert [spins.check(0.01, 20.5), spins.check(0.01, 20.75), spins.check(0.9, 21.0)] == [0, 0, 1]


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_short_spins_are_a_team_of_idle_threads_beside_the_own_one() -> None:
    if not any("libgomp" in path for path in process.loaded_libraries()):
        pytest.skip("this torch has no libgomp")
    torch.zeros(1)
    before = num_threads()
    spins = ShortSpins(3)
    while num_threads() < before + 3:
        os.sched_yield()
    assert torch.ones(100_000).sum() == 100_000
    spins.close()
    while num_threads() > before:
        os.sched_yield()


def test_the_watch_shortens_spins_by_the_threads_delay_and_ends_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done, opened, importing = Counter[str](), threading.Event(), threading.Event()

    class Recorded:
        def __init__(self, size: int) -> None:
            done[f"open {size}"] += 1
            opened.set()

        def close(self) -> None:
            done["close"] += 1

    def crowded() -> dict[str, float]:
        if done["check"] == 3:
            importing.set()
        done["check"] += 1
        return {"1": float(done["check"]), "2": 0.0}

    monkeypatch.setattr(process, "ShortSpins", Recorded)
    monkeypatch.setattr(process, "CHECK_SECONDS", 0.001)
    monkeypatch.setattr(process, "thread_delays", crowded)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(torch.get_num_threads())))
    with ExitStack() as watch:
        with monkeypatch.context() as half_imported:
            half_imported.setitem(sys.modules, "torch", ModuleType("torch"))
            watch.enter_context(waits_by_load(Choice(None, "", True, "", False, "")))
            assert importing.wait(60)
            assert not opened.is_set()
        assert opened.wait(60)
    assert (done["open 2"], done["close"]) == (1, 1)
    assert all(thread.name != "fastalign-waits" for thread in threading.enumerate())
    with waits_by_load(Choice(None, "", False, "", False, "")):
        assert all(thread.name != "fastalign-waits" for thread in threading.enumerate())


TUNED = """
import ctypes, os, sys
from fastalign import process

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]

def mapped():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.mallinfo2.restype = Mallinfo
    before = libc.mallinfo2().d
    libc.malloc(64 << 20)
    return libc.mallinfo2().d - before

place = process.this_place()
process.this_place = lambda: process.Place(8, quota=3, allocator=place.allocator)
assert process.tuned().num_threads == 3 and "OMP_NUM_THREADS" not in os.environ
if place.allocator == "glibc":
    assert mapped() == 1  # a large block is returned to the system when it is freed
choice = process.tune_process()
assert os.environ["OMP_NUM_THREADS"] == "3" and process.tuned() is choice
assert choice.keeps_memory == (place.allocator == "glibc")
if choice.keeps_memory:
    assert mapped() == 0
assert "torch" not in sys.modules
"""


def test_a_process_is_tuned_before_torch_is_imported() -> None:
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMP_", "MKL_", "MALLOC_")) and name != "WORLD_SIZE"
    }
    done = subprocess.run(
        [sys.executable, "-c", TUNED], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [["--help"], ["doctor"]])
def test_a_command_whose_output_nobody_reads_ends_in_silence(command: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does once it has its lines
    done = subprocess.run(
        [sys.executable, "-m", "fastalign", *command],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
