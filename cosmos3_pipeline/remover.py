"""A process that outlives the process which starts it, because nothing else can remove files after SIGKILL.

`stopping` starts this file without the package, so that the start takes 25 ms of CPU time. On standard input
`+path` names a file or folder to remove, and `-path` one to keep, each ended by NUL. The input ends with the other
process.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from contextlib import suppress


def main(seconds: float) -> None:
    """Read until the input ends. Then wait, because others may still read files in the folders, and remove all."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    left, rest = set[bytes](), b""
    while got := os.read(0, 1 << 16):
        *told, rest = (rest + got).split(b"\0")
        for words in told:
            (left.add if words.startswith(b"+") else left.discard)(words[1:])
    if any(map(os.path.lexists, left)):
        time.sleep(seconds)
    for path in left:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                os.unlink(path)


if __name__ == "__main__":
    main(float(sys.argv[1]))
