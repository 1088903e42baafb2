"""Checks of the environment variables of a world that torchrun or a scheduler has started. Imports no torch."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping

from cosmos3_pipeline.errors import Problem

# The variables that torch reads to join a world. Without RANK this package reads none of the others.
NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NO_WORLD = "env -u RANK python launch.py ... where no torchrun was started; torchrun itself sets them all"
MOST_PORT = 65535


def world_problems(environ: Mapping[str, str]) -> Iterator[Problem]:
    """Problems of an incomplete world in `environ`, such as leftovers of another program; none without RANK."""
    if "RANK" not in environ:
        return
    lacking = [name for name in NAMES if not environ.get(name, "").strip()]
    if lacking:
        yield _problem(environ, f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} empty or not set")
        return
    wrong = [name for name in ("RANK", "WORLD_SIZE", "MASTER_PORT") if not environ[name].strip().isdecimal()]
    if wrong:
        yield _problem(environ, f"{' and '.join(wrong)} must be a whole number")
    elif int(environ["RANK"]) >= int(environ["WORLD_SIZE"]):
        yield _problem(environ, "ranks are counted from 0, so RANK must be less than WORLD_SIZE")
    elif not 0 < int(environ["MASTER_PORT"]) <= MOST_PORT:
        yield _problem(environ, f"MASTER_PORT must be 1 to {MOST_PORT}")
    elif not _has_address(environ["MASTER_ADDR"]):
        yield _problem(environ, f"{environ['MASTER_ADDR']} has no address that this machine knows")


def _problem(environ: Mapping[str, str], why: str) -> Problem:
    said = " ".join(f"{name}={environ[name]}" for name in NAMES if name in environ)
    return Problem(
        what=f"the environment has {said}",
        why=f"with RANK this process would join a world that exists already, and {why}",
        works=NO_WORLD,
    )


def _has_address(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False
    return True
