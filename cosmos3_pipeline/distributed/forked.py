"""What the process that ranks are forked from imports first: it ends with the launcher while it imports.

It hears that the launcher has gone once it waits for requests. The imports before take seconds, in which Linux
ends it; elsewhere it ends after them.
"""

from __future__ import annotations

import ctypes
import signal
from contextlib import suppress

_PR_SET_PDEATHSIG = 1

with suppress(OSError, AttributeError):  # a system without it
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
