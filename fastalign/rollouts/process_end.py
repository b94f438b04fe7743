"""Processes that end together: none outlives the one that started it, however that ended."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1  # of Linux: a signal for the end of the parent
GRACE_SECONDS = 15.0
POLL_SECONDS = 0.2


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Has this process sent a signal when its parent is gone (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it was gone before
        os._exit(1)


def supervise(command: Sequence[str]) -> int:
    """Runs a command and all that it starts, and ends it all when it, or this process, ends.

    SIGINT and SIGTERM are passed on; what has not ended after a while, or after the second of
    them, is killed. Python's own trackers of shared memory are left to remove what is theirs.

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
    try:
        while process.poll() is None:
            if asked and (len(asked) > 1 or time.monotonic() > asked[0] + GRACE_SECONDS):
                process.kill()
            time.sleep(POLL_SECONDS)
    finally:
        end_session(process.pid)
        for number, handler in before.items():
            signal.signal(number, handler)
    return process.returncode


def end_session(session: int) -> None:
    """Kills what is left of a session; its trackers of shared memory have time to clean up."""
    import psutil

    left = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session:
                left.append((process, "resource_tracker" in " ".join(process.cmdline())))
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    for process, is_tracker in left:
        if not is_tracker:
            process.kill()
    _, alive = psutil.wait_procs([process for process, _ in left], timeout=GRACE_SECONDS)
    for process in alive:
        process.kill()
