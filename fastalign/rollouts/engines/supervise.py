"""A command whose processes end together, and end with the process that started them.

`python -P supervise.py PARENT FOLDER COMMAND...` supervises a command for the process PARENT: it
is ended with that process, which can then no longer remove FOLDER and its folders of weights. The
file imports nothing but the standard library, so that this starts at once.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1  # Linux: the signal sent at the parent's end
GRACE_SECONDS = 15.0
POLL_SECONDS = 0.2
LOOK_SECONDS = 2.0
TRACKER_SECONDS = 5.0
OURS = ("psm_", "sem.mp-")
SYNC_PREFIX = "fastalign-sync-"  # folders of weights; then the machine and the process


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def supervise(command: Sequence[str], *, engine: str) -> int:
    """Run a command, and end everything that it started when it, or this process, ends.

    SIGINT and SIGTERM are passed on; processes that have not ended `GRACE_SECONDS` later, or at
    the second signal, are killed. Shared memory and semaphores that Python made for them are
    removed.

    `engine` is a part of the command line of a process without which the others are useless: they
    are killed when it was found once and has been missing for `GRACE_SECONDS`.

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
    seen: float | None = None  # when the engine was last found
    looked = -LOOK_SECONDS
    try:
        while process.poll() is None:
            now = time.monotonic()
            if now > looked + LOOK_SECONDS:
                looked, processes = now, processes_of(process.pid)
                memory |= shared_memory_of(processes)
                seen = now if any(engine in command_line(p) for p in processes) else seen
            dead = seen is not None and now > seen + GRACE_SECONDS
            if dead or (asked and (len(asked) > 1 or now > asked[0] + GRACE_SECONDS)):
                process.kill()
            time.sleep(POLL_SECONDS)
    finally:
        end_session(process.pid, memory)
        for number, handler in before.items():
            signal.signal(number, handler)
    return process.returncode


def processes_of(session: int) -> list[int]:
    """Return the ids of the processes that are left of a session."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(entry.name)) == session:
                found.append(int(entry.name))
        except (ProcessLookupError, PermissionError):
            continue  # it has just ended, or is another user's
    return found


def command_line(process: int) -> str:
    """Return a process's command line; an empty one if it has just ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def shared_memory_of(processes: Sequence[int]) -> set[Path]:
    """Return the mapped files of shared memory and semaphores, by the names Python gives them."""
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
    """Kill what is left of a session, and remove its shared memory.

    Python's trackers of shared memory are killed last: they remove what they know of themselves.
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


def remove_folders(process: int, folder: str) -> None:
    """Remove the folder and the weights that a process, which has ended, left on this machine."""
    shutil.rmtree(folder, ignore_errors=True)
    for parent in {"/dev/shm", tempfile.gettempdir()}:
        for left in Path(parent).glob(f"{SYNC_PREFIX}{socket.gethostname()}-{process}-*"):
            shutil.rmtree(left, ignore_errors=True)


def main(arguments: Sequence[str]) -> int:
    """Supervise a command for another process; returns the command's exit code."""
    parent, folder, *command = arguments
    end_with_parent(int(parent), signal.SIGTERM)
    code = supervise(command, engine="EngineCore")
    if os.getppid() != int(parent):
        remove_folders(int(parent), folder)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
