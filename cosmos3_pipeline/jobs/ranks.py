"""Starts the ranks that do the job of a composition. Imports no torch before they start."""

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

LAUNCHER = "COSMOS3_LAUNCHER"  # tells a fork server the process id of its launcher, see `distributed.forked`


def on_ranks(cfg: Config, output: Path, entry: str, *payload: Any, own_process: bool = False) -> None:
    """Save `cfg` in `output` and call `entry(cfg, *payload, output)` on every rank. `payload` must pickle.

    `entry` is "module:function". Only the ranks import the module, because the import takes long.

    With one rank the call is made in this process, unless `own_process` asks for a fresh process. With RANK in the
    environment this process is the root of a world that exists already. If a rank fails, half-written files in
    `output` are removed. Raises RankFailed.
    """
    write_whole(output / "config.yaml", as_yaml(cfg))
    ranks, device = cfg.topology.nodes * cfg.topology.ranks_per_node, cfg.topology.device
    if "RANK" in os.environ or (ranks == 1 and not own_process):
        call(entry, cfg, *payload, str(output))
        return
    if device == Device.cpu:
        import_for_ranks(entry)  # it runs in parallel with the import below
    from cosmos3_pipeline.distributed.launch import run_ranks

    try:
        run_ranks(call, entry, cfg, *payload, str(output), ranks=ranks, device=device.value)
    finally:
        for folder in (output, *output.glob("line_*")):  # each line of a prompt file has its own folder
            remove_partial(folder)


def call(entry: str, *payload: Any) -> None:
    """Call the function `entry`, "module:function". The last value of `payload` is the folder that it writes to.

    Raises Fault for errors of the machine, such as a full disk.
    """
    with told_as_fault(str(payload[-1])):
        resolve_name(entry)(*payload)


def import_for_ranks(entry: str) -> None:
    """Start the process from which ranks on CPU are forked. It imports their modules once for all of them.

    It lives as long as this process, for the next runs of a sweep.
    """
    if not can_fork_ranks():
        return
    set_start_method("forkserver", force=True)  # the method that `run_ranks` uses for ranks on CPU
    set_forkserver_preload(["cosmos3_pipeline.distributed.forked", entry.partition(":")[0]])
    if parent_process() is None:  # in a child process, the folder of the server's socket belongs to the parent
        stopping.add_leftover(Path(util.get_temp_dir()))
    resource_tracker.ensure_running()  # first, because starting it unblocks signals
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        with stopping.inherited_blocked():
            forkserver.ensure_running()
    finally:
        del os.environ[LAUNCHER]
