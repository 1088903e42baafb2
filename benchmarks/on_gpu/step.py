"""Runs one step in a separate process: `python -m on_gpu.step NAME --file FILE`."""

from __future__ import annotations

import argparse
import multiprocessing
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from on_gpu.setting import Setting

# The steps, the most important first. Each has a module of this package with a function that takes a `Setting`,
# and the property of the setting with its number of ranks.
STEPS = {
    "machine": ("machine:facts_and_messages", "ranks_with_messages"),
    "exact": ("exact:check_all", "ranks"),
    "decode": ("decode:decode", "gpus_or_one"),
    "kernels": ("kernels:compare_all", "one"),
    "denoise": ("denoise:denoise", "gpus_or_one"),
    "whole": ("whole:measure", "one"),
}


def main() -> None:
    # Both modules import torch. Readers of STEPS do not need it.
    from cosmos3_pipeline.distributed.launch import run_ranks
    from on_gpu.setting import Setting

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=STEPS)
    parser.add_argument("--file", required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--topology", required=True)
    given = parser.parse_args()
    setting = Setting(given.device, given.small, given.file, given.topology)
    place, ranks = STEPS[given.name]
    # Ranks on a CPU are forked from a process that has imported their modules once for all of them.
    multiprocessing.set_forkserver_preload([f"on_gpu.{place.partition(':')[0]}"])
    run_ranks(on_a_rank, place, setting, ranks=getattr(setting, ranks), device=given.device)


def on_a_rank(place: str, setting: Setting) -> None:
    """Call the function at `place`. Only the ranks import its module, because that takes seconds."""
    module, _, function = place.partition(":")
    getattr(import_module(f"on_gpu.{module}"), function)(setting)


if __name__ == "__main__":
    main()
