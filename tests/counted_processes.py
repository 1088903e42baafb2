"""Counts in every process of a command how often it composes, checks and plans, and which of them are ranks."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

# Python imports it in every process that finds it on its path: in the launcher and in each rank.
SITECUSTOMIZE = """
import functools, importlib.abc, importlib.machinery, os, sys

COUNTED = {
    "hydra._internal.config_loader_impl": ("ConfigLoaderImpl", "load_configuration", "compose"),
    "cosmos3_pipeline.config.checks": (None, "problems", "check structure"),
    "cosmos3_pipeline.planning.checks": (None, "check", "check"),
    "cosmos3_pipeline.planning.vae": (None, "vae_plan", "plan vae"),
    "cosmos3_pipeline.planning.plan": (None, "make_plan", "plan"),
    "cosmos3_pipeline.jobs.rank": (None, "run_rank", "rank"),
}


class Counting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in COUNTED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module

        def counted(module):
            run(module)
            owner, function, word = COUNTED[name]
            owner = module if owner is None else getattr(module, owner)
            setattr(owner, function, told(getattr(owner, function), word))

        spec.loader.exec_module = counted
        return spec


def told(function, word):
    @functools.wraps(function)
    def call(*args, **kwargs):
        with open(os.environ["COSMOS3_COUNT"], "a") as file:
            file.write(f"{os.getpid()} {word}\\n")
        return function(*args, **kwargs)

    return call


sys.meta_path.insert(0, Counting())
"""


def counting_in(folder: Path) -> dict[str, str]:
    """The environment of a command that counts. Its files are in `folder`."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    path = os.pathsep.join([str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "COSMOS3_COUNT": str(folder / "count")}


def counts(counting: dict[str, str]) -> list[Counter[str]]:
    """For each process, in the order in which they began, how often it did what is counted."""
    processes: dict[str, Counter[str]] = {}
    for line in Path(counting["COSMOS3_COUNT"]).read_text().splitlines():
        process, _, word = line.partition(" ")
        processes.setdefault(process, Counter())[word] += 1
    return list(processes.values())


# With one clip from text the VAE has one direction to plan; one with a picture to begin from has two.
ONCE = Counter({"compose": 1, "check structure": 1, "check": 1, "plan vae": 1, "plan": 1})
