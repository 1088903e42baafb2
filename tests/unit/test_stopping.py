"""A process that a signal ends: in order where it can, in time where it cannot, and in one line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A started program prints `ready` when the signal may come.
BEGIN = """
import signal, sys, time
from pathlib import Path
from cosmos3_pipeline import stopping
stopping.GRACE_SECONDS = 0.3
begun = Path(sys.argv[1])
def main():
    with stopping.leftover(begun):
        begun.touch()
        work()
    return 0
"""
IN_ORDER = """
def work():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        begun.unlink()
        print("tidied up", flush=True)
"""
SWALLOWS = """
def work():
    while True:
        try:
            print("ready", flush=True)
            time.sleep(60)
        except BaseException:
            pass
"""
# A call into a library that holds on to the thread, and to which no handler gets.
DEAF = """
def work():
    import hashlib
    while True:
        try:
            print("ready", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
        except BaseException:  # the signal has come before the call
            pass
"""
# The handler runs in a call that cannot raise, as in one of the collector's.
DROPPED = """
def work():
    class Kept:
        def __del__(self):
            print("ready", flush=True)
            while stopping._stopped_by is None:
                pass
    try:
        Kept()
        time.sleep(60)
    finally:
        begun.unlink()
"""
# Two things are not whole when it is killed, and another is.
KILLED = """
def work():
    stopping.REMOVE_SECONDS = 0.0
    whole, folder = begun.with_name("whole"), begun.with_name("folder")
    folder.mkdir()
    with stopping.leftover(whole):
        whole.touch()
    with stopping.leftover(folder), stopping.leftover(folder / "file"):
        (folder / "file").touch()
        print("ready", flush=True)
        time.sleep(60)
"""
STOPPABLE = "\nstopping.on_signals()\nsys.exit(stopping.stoppable(main))\n"
EARLY = "\nstopping.on_signals()\nmain()\n"
IGNORED = (
    "\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\nstopping.on_signals()\nsys.exit(stopping.stoppable(main))\n"
)


@pytest.mark.parametrize(
    ("work", "start", "number", "code", "said"),
    [
        (IN_ORDER, STOPPABLE, signal.SIGTERM, 143, "tidied up"),
        (IN_ORDER, STOPPABLE, signal.SIGINT, 130, "tidied up"),
        (SWALLOWS, STOPPABLE, signal.SIGHUP, 129, "ready"),
        (DROPPED, STOPPABLE, signal.SIGTERM, 143, None),
        (DEAF, STOPPABLE, signal.SIGTERM, 143, None),
        (IN_ORDER, EARLY, signal.SIGTERM, 143, ""),
    ],
)
def test_a_signal_ends_a_process_in_one_line(
    work: str, start: str, number: signal.Signals, code: int, said: str | None, tmp_path: Path
) -> None:
    begun = tmp_path / "begun"
    run = started(BEGIN + work + start, begun)
    run.send_signal(number)
    out, err = run.communicate(timeout=60)
    assert run.returncode == code
    assert said is None or out.strip() == said
    assert err.strip() == f"stopped by {number.name}; nothing half-written is left"
    assert not begun.exists()


@pytest.mark.parametrize("start", [STOPPABLE, EARLY])
def test_what_a_killed_process_had_begun_is_removed(start: str, tmp_path: Path) -> None:
    run = started(BEGIN + KILLED + start, tmp_path / "begun")
    run.kill()
    run.communicate(timeout=60)  # and does not wait for the process that removes it
    while [file.name for file in tmp_path.iterdir()] != ["whole"]:
        time.sleep(0.01)


def test_a_remover_that_is_killed_changes_nothing(tmp_path: Path) -> None:
    work = """
def work():
    stopping._remover.kill()
    stopping._remover.wait()
    with stopping.leftover(begun.with_name("more")):
        print("ready", flush=True)
"""
    run = started(BEGIN + work + STOPPABLE, tmp_path / "begun")
    assert run.communicate(timeout=60) == ("", "") and run.returncode == 0


def test_a_forked_process_writes_nothing_to_its_parents_remover(tmp_path: Path) -> None:
    """It may have closed the pipe, and then another file of its own has the same number."""
    work = """
def work():
    print("ready", flush=True)
    warnings.simplefilter("ignore")  # later Pythons warn of a fork beside a thread, such as the remover's
    number, other = stopping._remover.stdin.fileno(), begun.with_name("other")
    child = os.fork()
    if not child:
        os.closerange(3, 64)
        os.dup2(os.open(other, os.O_WRONLY | os.O_CREAT), number)
        with stopping.leftover(begun.with_name("more")):
            os._exit(len(stopping._leftovers))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), other.stat().st_size)
"""
    run = started(BEGIN + "import os, warnings\n" + work + STOPPABLE, tmp_path / "begun")
    assert run.communicate(timeout=60) == ("1 0\n", "") and run.returncode == 0


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path) -> None:
    """As `nohup` asks for."""
    run = started(BEGIN + IN_ORDER + IGNORED, tmp_path / "begun")
    run.send_signal(signal.SIGHUP)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == 143


# An object that the interpreter's shutdown would wait for, as it collects torch's.
COLLECTED = """
def work():
    sys.kept = Kept()
    print("ready", flush=True)
class Kept:
    def __del__(self, sleep=time.sleep):
        sleep(600)
"""


@pytest.mark.parametrize(("end", "code"), [("", 0), ("    sys.exit(3)\n", 3), ("    raise KeyError(4)\n", 1)])
def test_a_rank_of_torchrun_ends_without_the_shutdown_that_stops_its_watch(
    end: str, code: int, tmp_path: Path
) -> None:
    work = COLLECTED.replace("class", f"{end}class")
    run = started(BEGIN + work + STOPPABLE, tmp_path / "begun", TORCHELASTIC_RUN_ID="x")
    _, err = run.communicate(timeout=60)
    assert run.returncode == code and ("KeyError: 4" in err) == (code == 1)


def test_a_signal_in_the_shutdown_changes_nothing(tmp_path: Path) -> None:
    """The work is done by then."""
    signals = COLLECTED.replace("sleep=time.sleep", "kill=signal.raise_signal").replace("sleep(600)", "kill(15)")
    run = started(BEGIN + signals + STOPPABLE, tmp_path / "begun")
    assert run.communicate(timeout=60)[1] == "" and run.returncode == 0


def test_a_rank_whose_agent_ended_before_it_looked_ends(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))  # and does not listen
        agent = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "localhost"}
        run = subprocess.run(
            [sys.executable, "-c", BEGIN + IN_ORDER + STOPPABLE, str(tmp_path / "begun")],
            env={**os.environ, **agent, "MASTER_PORT": str(listener.getsockname()[1])},
            timeout=60,
        )
    assert run.returncode == 1 and not (tmp_path / "begun").exists()


@pytest.mark.parametrize("flush", [False, True])
def test_an_output_that_takes_nothing_is_told_in_three_parts(flush: bool, tmp_path: Path) -> None:
    work = f"def work():\n    print('a table', flush={flush})\n"
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-c", BEGIN + work + STOPPABLE, str(tmp_path / "begun")],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "standard output cannot be written" in run.stderr and "works: " in run.stderr


def test_an_output_that_is_closed_is_no_error(tmp_path: Path) -> None:
    work = "def work():\n    print('a table', sys.stdout.isatty(), flush=True)\n"
    run = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" "$2" >&-', sys.executable, BEGIN + work + STOPPABLE, str(tmp_path / "begun")],
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stderr) == (0, "")


# Commands that only print. Their output is full or closed.
@pytest.mark.parametrize(
    ("arguments", "redirected", "code", "said"),
    [
        ("--info config", ">/dev/full", 1, "standard output cannot be written"),  # Hydra's logger prints it
        ("--version", ">&-", 1, "it was closed by the shell"),
        ("job=nope", "2>/dev/full", 2, ""),
    ],
)
def test_a_command_that_prints_ends_well_without_its_streams(
    arguments: str, redirected: str, code: int, said: str
) -> None:
    command = f"{sys.executable} -m cosmos3_pipeline {arguments} {redirected}"
    run = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert run.returncode == code
    assert said in run.stderr and "Traceback" not in run.stderr and (not said or "works: " in run.stderr)


def started(code: str, begun: Path, **environ: str) -> subprocess.Popen[str]:
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(begun)],
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    return run
