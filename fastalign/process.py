"""Settings of the command line's process: threads, the allocator, and how threads wait.

`fastalign` calls `tune_process` before torch is imported, since OpenMP reads its settings when it
is loaded, and runs its command inside `waits_by_load`. A program of your own may do the same;
`import fastalign` changes nothing.
"""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT_BYTES = 2**31 - 1  # mallopt takes an int
CHECK_SECONDS = 0.25
# Seconds per second that the threads together wait for a core; alone on a machine it is 0.01.
CROWDED = 0.1
QUIET_SECONDS = 10.0  # without a delay, before long spins are tried again


@dataclass(frozen=True)
class Place:
    """Cores and allocator of this process, as the system grants them.

    Attributes:
        num_cores: cores that it may run on.
        quota: cores that the container's CPU quota is worth; None: no quota.
        tells_delay: True if the system tells how long threads wait for a core.
        allocator: name of the allocator: `glibc`, one of ALLOCATORS, or empty if it is another.
    """

    num_cores: int
    quota: float | None = None
    tells_delay: bool = True
    allocator: str = "glibc"


@dataclass(frozen=True)
class Choice:
    """Settings of a process, each with its reason for `fastalign doctor`.

    Attributes:
        num_threads: value of OMP_NUM_THREADS to set; None: left as it is.
        threads: reason.
        adapts: True if OpenMP's threads are to spin for a shorter time under load.
        waiting: reason.
        keeps_memory: True if the allocator is told to keep large freed blocks.
        allocator: reason.
    """

    num_threads: int | None
    threads: str
    adapts: bool
    waiting: str
    keeps_memory: bool
    allocator: str


def choose(place: Place, environment: Mapping[str, str]) -> Choice:
    """Return what to set for a process; what the user set in the environment is left alone."""
    num_threads, threads = _choose_threads(place, environment)
    adapts, waiting = _choose_waiting(place, environment, num_threads)
    keeps, allocator = _choose_allocator(place, environment)
    return Choice(num_threads, threads, adapts, waiting, keeps, allocator)


def _first_set(names: tuple[str, ...], environment: Mapping[str, str]) -> str | None:
    return next((name for name in names if environment.get(name)), None)


def _choose_threads(place: Place, environment: Mapping[str, str]) -> tuple[int | None, str]:
    if name := _first_set(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), environment):
        return None, f"{name}={environment[name]}"
    if place.quota is not None and place.quota < place.num_cores:
        return max(int(place.quota), 1), f"the container's quota is {place.quota:g} cores"
    return None, "torch's own number"


def _choose_waiting(
    place: Place, environment: Mapping[str, str], num_threads: int | None
) -> tuple[bool, str]:
    if name := _first_set(("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"), environment):
        return False, f"{name}={environment[name]}"
    if not place.tells_delay:
        return False, "as OpenMP does: the system does not tell how long threads wait for a core"
    given = environment.get("OMP_NUM_THREADS", "")
    threads = num_threads or (int(given) if given.isdecimal() else place.num_cores)
    if threads == 1:
        return False, "one thread waits for no other"
    ranks = environment.get("LOCAL_WORLD_SIZE", "")
    if place.num_cores > 2 * threads * (int(ranks) if ranks.isdecimal() else 1):
        return False, "as OpenMP does: half of the cores are free for other work"
    until = f"until it has not for {QUIET_SECONDS:g} seconds"
    return True, f"OpenMP's threads spin; once other work holds their cores they sleep, {until}"


def _choose_allocator(place: Place, environment: Mapping[str, str]) -> tuple[bool, str]:
    if place.allocator != "glibc":
        return False, f"{place.allocator or 'not glibc'}, left as it is"
    name = next((name for name in environment if name.startswith("MALLOC_")), None)
    if name is None and "malloc" in environment.get("GLIBC_TUNABLES", ""):
        name = "GLIBC_TUNABLES"
    if name:
        return False, f"glibc with {name}={environment[name]}"
    if environment.get("WORLD_SIZE", "1") != "1":
        return False, "glibc as it is: ranks share the machine's memory"
    return True, "glibc, told to keep freed blocks of up to 2 GiB for the next step"


def cpu_quota(
    own: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> float | None:
    """Return the cores that the container's quota (cgroup v2 or v1) is worth; None: no quota."""
    found = []
    with suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number != "0" and "cpu" not in controllers.split(","):
                continue
            top = mount if number == "0" else mount / "cpu"
            folder = top / path.lstrip("/")
            # Of nested groups the smallest quota counts; in a container the path may be the host's.
            for group in (folder, *folder.parents):
                found.append(_quota_of(group))
                if group == top:
                    break
    return min((quota for quota in found if quota is not None), default=None)


def _quota_of(group: Path) -> float | None:
    """Return the quota of one control group; None if it has none or is not there."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
            return None if quota == "max" else int(quota) / int(period)
        time_us = int((group / "cpu.cfs_quota_us").read_text())
        return None if time_us <= 0 else time_us / int((group / "cpu.cfs_period_us").read_text())
    return None


def this_place() -> Place:
    """Return what the machine grants to this process."""
    affinity = getattr(os, "sched_getaffinity", None)  # of Linux
    num_cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return Place(num_cores, cpu_quota(), bool(thread_delays()), _allocator())


def _allocator() -> str:
    libraries = " ".join(loaded_libraries())
    for name in ALLOCATORS:
        if name in libraries:
            return name
    return "glibc" if hasattr(ctypes.CDLL(None), "gnu_get_libc_version") else ""


def loaded_libraries() -> list[str]:
    """Return the paths of the shared libraries in this process; none where there is no /proc."""
    with suppress(OSError):
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sorted({line.split()[-1] for line in lines if ".so" in line})
    return []


_tuned: Choice | None = None


def tune_process() -> Choice:
    """Set this process's number of threads and allocator, and return what was set.

    Call it before torch is imported, and so OpenMP loaded. What the user set (OMP_NUM_THREADS,
    MALLOC_TRIM_THRESHOLD_ and the like) is left alone.
    """
    global _tuned
    _tuned = choice = choose(this_place(), os.environ)
    if choice.num_threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(choice.num_threads)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(choice.num_threads)
    if choice.keeps_memory:
        # Otherwise glibc returns each large tensor to the system, whose zeroed pages cost more than
        # many an operation on them.
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    return choice


def tuned() -> Choice:
    """Return what `tune_process` set, or what it would set."""
    return _tuned or choose(this_place(), os.environ)


def thread_delays() -> dict[str, float]:
    """Return the seconds that each thread of this process has waited for a core, by its id.

    It is empty where the system does not tell.
    """
    delays = {}
    with suppress(OSError):
        for task in os.listdir("/proc/self/task"):
            with suppress(OSError):  # it has ended
                text = Path(f"/proc/self/task/{task}/schedstat").read_text()
                delays[task] = int(text.split()[1]) / 1e9
    return delays


class Spins:
    """The decision between long and short spins, from the threads' delay since the last check."""

    def __init__(self) -> None:
        self.short = False
        self._crowded = 0.0  # time of the last check with a delay

    def check(self, delay: float, now: float) -> bool:
        """Return whether spins are to be short: from a delay on until none was for QUIET_SECONDS.

        `delay` is in seconds per second; `now` the time.
        """
        if delay > CROWDED:
            self.short, self._crowded = True, now
        elif now - self._crowded >= QUIET_SECONDS:
            self.short = False
        return self.short


class ShortSpins:
    """Makes OpenMP's threads sleep at a barrier after a short spin, until it is closed.

    libgomp spins 300,000 times, and 100 times while it manages more threads than there are cores
    (GOMP_SPINCOUNT in its manual). So a thread of ours holds a team of idle threads: the numerical
    work keeps its own team, and the same bits.
    """

    def __init__(self, num_threads: int) -> None:
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._hold, args=(num_threads,), daemon=True)
        self._thread.start()

    def _hold(self, num_threads: int) -> None:
        nothing = ctypes.CDLL(None).free  # of NULL: a function for the team to run
        for path in loaded_libraries():
            if "libgomp" in Path(path).name:
                ctypes.CDLL(path).GOMP_parallel(nothing, None, num_threads, 0)
        self._closed.wait()

    def close(self) -> None:
        """End the idle threads."""
        self._closed.set()
        self._thread.join()


@contextmanager
def waits_by_load(choice: Choice) -> Iterator[None]:
    """Watch how long this process's threads wait for a core; keep spins short while they do.

    Threads that spin at a barrier hold the core that the last thread to come needs: beside one
    other busy process a step of a small model took fifty times as long.
    """
    if not choice.adapts:
        yield
        return
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ended,), name="fastalign-waits", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _watch(ended: threading.Event) -> None:
    spins, held = Spins(), None
    time_before, before = time.monotonic(), thread_delays()
    while not ended.wait(CHECK_SECONDS):
        now, delays = time.monotonic(), thread_delays()
        waited = sum(delays[task] - before[task] for task in delays.keys() & before.keys())
        short = spins.check(waited / (now - time_before), now)
        time_before, before = now, delays
        # None before torch is imported, and while it is.
        get_num_threads = getattr(sys.modules.get("torch"), "get_num_threads", None)
        if short and held is None and get_num_threads is not None:
            team = len(os.sched_getaffinity(0)) - get_num_threads() + 2
            held = ShortSpins(max(team, 2))
        elif not short and held is not None:
            held.close()
            held = None
    if held is not None:
        held.close()
