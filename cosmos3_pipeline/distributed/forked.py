"""First import of the fork server: Linux is asked to kill the fork server as soon as the launcher ends.

A fork server notices the end of the launcher only when it waits for requests. Its imports before that take
seconds. On other systems than Linux it ends after its imports.
"""

from __future__ import annotations

import ctypes
import os
import signal
from contextlib import suppress

_PR_SET_PDEATHSIG = 1

with suppress(OSError, AttributeError):  # a system without it
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
if os.environ.pop("COSMOS3_LAUNCHER", str(os.getppid())) != str(os.getppid()):
    os._exit(1)  # the launcher ended before Linux was asked
