"""`python launch.py ...` in a fork of a process that has imported torch and diffusers in eight seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from io import FileIO, TextIOWrapper
from multiprocessing import util
from pathlib import Path

from limits import HANGS

from cosmos3_pipeline.vae.plugins import discover

# One server for all that the tests of this process fork, see distributed/ranks.py.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["cosmos3_pipeline.cli", "cosmos3_pipeline.jobs.rank", "cosmos3_pipeline.distributed.launch", "diffusers"]
)


def run_forked(
    script: Path,
    *args: str,
    cwd: Path,
    env: dict[str, str],
    timeout: float = HANGS,
    meanwhile: Callable[[int], None] = lambda pid: None,
) -> subprocess.CompletedProcess[str]:
    """Run `python script *args` as `subprocess.run` does, with its output as text, in a process forked from this.

    `meanwhile` is called while the script runs. A module that is imported already does not read `env` again. A
    run's own ranks are forked as well.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = CONTEXT.Process(target=_run, args=(str(script), args, str(cwd), env, str(out), str(err)))
        process.start()
        try:
            meanwhile(process.pid)
            process.join(timeout)
            if process.exitcode is None:
                raise subprocess.TimeoutExpired([str(script), *args], timeout, out.read_text(), err.read_text())
        finally:
            process.kill()
            process.join()
        return subprocess.CompletedProcess(
            [str(script), *args], process.exitcode, out.read_text(), err.read_text()
        )


def _run(script: str, args: tuple[str, ...], cwd: str, env: dict[str, str], out: str, err: str) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for stream, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    _plain_streams()
    sys.argv = [script, *args]
    if new := [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]:
        sys.path[:0] = new
        discover.cache_clear()  # they may have plugins
    spawn = util.spawnv_passfds
    util.spawnv_passfds = lambda *asked: _fork_server(*asked) or spawn(*asked)
    runpy.run_path(script, run_name="__main__")


def _plain_streams() -> None:
    sys.stdout, sys.stderr = (
        TextIOWrapper(FileIO(file, "w", closefd=False), line_buffering=True) for file in (1, 2)
    )


def _fork_server(path: bytes, args: list[str], passed: list[int]) -> int:
    """The process that ranks are forked from, as a fork of this one; 0 where another program is asked for.

    Like a new process it has no open file but those that are passed: it ends when the other end of one is closed.
    """
    if "multiprocessing.forkserver" not in args[-1]:
        return 0
    process = os.fork()
    if process:
        return process
    try:
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in (0, 1, 2, *passed):
                with suppress(OSError):  # the listing's own is closed already
                    os.close(int(name))
        _plain_streams()
        exec(args[-1], {})
    finally:
        os._exit(0)  # and none of the calls that led here goes on
