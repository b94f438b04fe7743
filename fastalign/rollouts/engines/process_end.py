"""Processes that end together: none outlives the one that started it, however that ended."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1  # of Linux: a signal for the end of the parent
GRACE_SECONDS = 15.0
POLL_SECONDS = 0.2
LOOK_SECONDS = 2.0
TRACKER_SECONDS = 5.0
OURS = ("psm_", "sem.mp-")


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Has this process sent a signal when its parent is gone (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it was gone before
        os._exit(1)


def supervise(command: Sequence[str], *, heart: str) -> int:
    """Runs a command and all that it starts, and ends it all when it, or this process, ends.

    SIGINT and SIGTERM are passed on; what has not ended after a while, or after the second of
    them, is killed. Shared memory and semaphores that Python made for them are removed.

    Args:
        command: to run.
        heart: in the command line of a process without which the others are of no use: when it
            has been there and is gone for a while, they are killed.

    Returns:
        The command's exit code.
    """
    parent = os.getpid()
    process = subprocess.Popen(
        command,
        start_new_session=True,
        preexec_fn=lambda: end_with_parent(parent, signal.SIGTERM),
    )
    asked: list[float] = []

    def pass_on(number: int, frame: object) -> None:
        asked.append(time.monotonic())
        process.send_signal(number)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM)}
    memory: set[Path] = set()
    beat: float | None = None  # when the heart was seen last
    looked = -LOOK_SECONDS
    try:
        while process.poll() is None:
            now = time.monotonic()
            if now > looked + LOOK_SECONDS:
                looked, processes = now, processes_of(process.pid)
                memory |= shared_memory_of(processes)
                beat = now if any(heart in command_line(p) for p in processes) else beat
            dead = beat is not None and now > beat + GRACE_SECONDS
            if dead or (asked and (len(asked) > 1 or now > asked[0] + GRACE_SECONDS)):
                process.kill()
            time.sleep(POLL_SECONDS)
    finally:
        end_session(process.pid, memory)
        for number, handler in before.items():
            signal.signal(number, handler)
    return process.returncode


def processes_of(session: int) -> list[int]:
    """Numbers of the processes that are left of a session."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(entry.name)) == session:
                found.append(int(entry.name))
        except (ProcessLookupError, PermissionError):
            continue  # it has just ended, or is another user's
    return found


def command_line(process: int) -> str:
    """As the system shows it; nothing of a process that has just ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def shared_memory_of(processes: Sequence[int]) -> set[Path]:
    """Files of shared memory and semaphores, by the names that Python gives them."""
    found: set[Path] = set()
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/maps").read_text(encoding="utf-8").splitlines()
        except OSError:
            continue  # it has just ended
        names = [line.rpartition(" ")[2] for line in lines if "/dev/shm/" in line]
        found |= {Path(name) for name in names if Path(name).name.startswith(OURS)}
    return found


def end_session(session: int, memory: set[Path]) -> None:
    """Kills what is left of a session, and removes its shared memory.

    Python's trackers of shared memory remove what they know of when the others are gone.
    """
    processes = processes_of(session)
    memory = memory | shared_memory_of(processes)
    start = time.monotonic()
    while processes and time.monotonic() < start + GRACE_SECONDS:
        for process in processes:
            is_tracker = "resource_tracker" in command_line(process)
            if is_tracker and time.monotonic() < start + TRACKER_SECONDS:
                continue
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(POLL_SECONDS)
        processes = processes_of(session)
    for path in memory:
        path.unlink(missing_ok=True)
