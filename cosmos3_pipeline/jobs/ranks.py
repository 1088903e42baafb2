"""From a composition to the ranks that do its job. Imports no torch before they start."""

from __future__ import annotations

import os
from multiprocessing import (
    forkserver,
    parent_process,
    resource_tracker,
    set_forkserver_preload,
    set_start_method,
    util,
)
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from cosmos3_pipeline import stopping
from cosmos3_pipeline.config.plain import as_yaml
from cosmos3_pipeline.config.schema import Config, Device
from cosmos3_pipeline.distributed.machine import can_fork_ranks, told_as_fault
from cosmos3_pipeline.stages.files import remove_partial, write_whole


def on_ranks(cfg: Config, output: Path, entry: str, *payload: Any, own_process: bool = False) -> None:
    """Save `cfg` in `output` and call `entry(cfg, *payload, output)` on every rank of it; `payload` must pickle.

    `entry` is written "module:function", so that only the ranks import it: they take long to.
    With one rank that is this process, unless `own_process` asks for a fresh one. With RANK in the environment
    this process is the root of a world that exists already. Files half written in `output` are removed when a
    rank failed. Raises RankFailed.
    """
    write_whole(output / "config.yaml", as_yaml(cfg))
    ranks, device = cfg.topology.nodes * cfg.topology.ranks_per_node, cfg.topology.device
    if "RANK" in os.environ or (ranks == 1 and not own_process):
        call(entry, cfg, *payload, str(output))
        return
    if device == Device.cpu:
        import_for_ranks(entry)  # beside what follows here
    from cosmos3_pipeline.distributed.launch import run_ranks

    try:
        run_ranks(call, entry, cfg, *payload, str(output), ranks=ranks, device=device.value)
    finally:
        for folder in (output, *output.glob("line_*")):  # a clip per line has a folder of its own
            remove_partial(folder)


def call(entry: str, *payload: Any) -> None:
    """Call the function `entry`, "module:function"; the last of `payload` is the folder that it writes to.

    Raises Fault for what the machine refuses.
    """
    with told_as_fault(str(payload[-1])):
        resolve_name(entry)(*payload)


def import_for_ranks(entry: str) -> None:
    """Begin the process from which ranks on CPU are forked: it imports what they need, once for all of them.

    It stays as long as this process, for the next runs of a sweep.
    """
    if not can_fork_ranks():
        return
    set_start_method("forkserver", force=True)  # what it is told to be like, see `run_ranks`
    set_forkserver_preload(["cosmos3_pipeline.distributed.forked", entry.partition(":")[0]])
    if parent_process() is None:  # otherwise the folder of the server's socket is that process's
        stopping.add_leftover(Path(util.get_temp_dir()))
    resource_tracker.ensure_running()  # it lets signals through when it has started
    with stopping.inherited_blocked():
        forkserver.ensure_running()
