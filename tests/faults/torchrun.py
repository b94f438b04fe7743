"""For the real torchrun: `-m tests.faults.torchrun RANK STEP ...` is `-m fastalign ...`.

That rank is killed in that step. The others are asked to end while they leave the loop, as torchrun
asks them at a moment of its own.
"""

import signal
import sys

from tests.faults.injected import Happens, Sent, run

if __name__ == "__main__":
    rank, step, *arguments = sys.argv[1:]
    death = Happens(Sent(signal.SIGKILL), step=int(step), rank=int(rank))
    end = Happens(Sent(signal.SIGTERM), "leave", step=int(step), rank=None)
    run([death, end], False, arguments)
