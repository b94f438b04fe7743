"""For the real torchrun: `-m tests.faults.torchrun RANK STEP ...` is `-m fastalign ...`.

That rank is killed in that step.
"""

import signal
import sys

from tests.faults import injected

if __name__ == "__main__":
    rank, step, *arguments = sys.argv[1:]
    death = injected.Happens(injected.Sent(signal.SIGKILL), step=int(step), rank=int(rank))
    injected.run([death], False, arguments)
