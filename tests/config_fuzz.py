"""Values that no key was made for, tried on every key of the schema: composed, checked and planned here.

The keys are the schema's and those of the installed strategies, so that a new one is tried without being named.
"""

from __future__ import annotations

import dataclasses
import math
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from itertools import cycle
from typing import Any

import yaml

from cosmos3_pipeline.config.compose import compose
from cosmos3_pipeline.config.kinds import schema_keys
from cosmos3_pipeline.errors import ConfigError, Problem
from cosmos3_pipeline.jobs.start import prepare
from cosmos3_pipeline.planning import checks
from cosmos3_pipeline.vae.plugins import discover

SMALL = ("model=toy_random", "sampler.steps=2", "task.height=32", "task.width=32")
CLIP = (*SMALL, "task.num_frames=5")
POLICY = ("model=toy_random", "task=policy", "task.domain=bridge_orig_lerobot", "sampler.steps=2")
TASKS = (CLIP, (*SMALL, "job=plan", "task=transfer"), (*POLICY, "job=plan"))
ON_RANKS = (*CLIP, "job=plan", "vae=parallel", "topology=cpu_x2")

VALUES = (
    *(
        "null",
        "text",
        "''",
        "'???'",
        "???",
        "/dev/null",
        "'~nobody/x'",
        "x" * 300,
        "true",
        "${task.nothing}",
        "${model}",
        "[${task.prompt}]",
    ),
    *("-1", "0", "1", "1.5", "100000", "4000000001", str(10**30), "1e-9", "1e308", "nan", "inf", "-inf"),
    *("[]", "[1]", "[-1,-1]", "[null]", "[text]", "[nan]", "[1e308,1e308]", "[???]", "{}", "{a:1}"),
)
CPU_SECONDS, MORE_BYTES = 20, 4 << 30
NOT_OURS = ("Error merging", "full_key", "object_type", "Hydra cannot compose", "Traceback")


@dataclasses.dataclass(frozen=True)
class Case:
    key: str
    value: str
    base: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join([*self.base, f"{self.key}={self.value}"])


def cases() -> list[Case]:
    """Every key with every value, those of a task in one task after the other."""
    found = []
    for key in schema_keys():
        bases = [ON_RANKS] if key.startswith(("topology", "vae")) else [CLIP]
        turns = cycle(TASKS if key.startswith("task") else bases)
        found += [Case(key, value, base) for value, base in zip(VALUES, turns, strict=False)]
    for name, cls in discover().strategies.items():
        for direction in sorted(cls.directions):
            base = (*ON_RANKS, f"vae/{direction}={name}")
            names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
            found += [Case(f"vae.{direction}.{each}", value, base) for each in names for value in VALUES]
    return found


class _Endless(BaseException):
    pass


@contextmanager
def _limits() -> Iterator[None]:
    """End what computes for long, or takes memory without end."""

    def end(*_: Any) -> None:
        raise _Endless

    before, (soft, hard) = signal.signal(signal.SIGPROF, end), resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MORE_BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)


def verdict(case: Case) -> str | None:
    """What is wrong with how `case` ends, None for nothing: it is refused in our words, or its value is taken."""
    checks.located = lambda problems, composition: problems  # which file set a key is told elsewhere, and is slow
    override = f"{case.key}={case.value}"
    base = [one for one in case.base if not one.startswith(f"{case.key}=")]
    try:
        with _limits():
            config = prepare(compose([*base, override]), fetch=False).config
    except ConfigError as error:
        return next(filter(None, (_badly_said(problem) for problem in error.problems)), None)
    except _Endless:
        return f"more than {CPU_SECONDS} CPU seconds"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    got: Any = config
    for part in case.key.split("."):
        got = got[part] if isinstance(got, dict) else getattr(got, part)
    return None if _is_taken(got, case.value) else f"accepted and ignored: it is {got!r:.80}"


def _badly_said(problem: Problem) -> str | None:
    text = f"{problem.what} {problem.why} {problem.works}"
    if not (problem.what.strip() and problem.why.strip() and problem.works.strip()):
        return f"a part of the refusal is empty: {problem}"
    return f"not in our words: {problem}" if any(words in text for words in NOT_OURS) else None


def _is_taken(got: Any, value: str) -> bool:
    if value.startswith("${") or dataclasses.is_dataclass(got):
        return value.startswith("${model}")
    if isinstance(got, list) and not any(map(dataclasses.is_dataclass, got)):
        items = [item for item in value.strip("[]").split(",") if item]
        return len(items) == len(got) and all(map(_is_taken, got, items))
    said = yaml.safe_load(value.replace(":", ": "))
    got = got.name if isinstance(got, Enum) else got
    if isinstance(got, str):
        return got in (value, value.strip("'"))
    if isinstance(got, bool):
        return said in (got, int(got))
    if isinstance(got, int | float):
        return _number(value) is not None and math.isclose(got, _number(value) or 0.0)
    return bool(got == said)


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None
