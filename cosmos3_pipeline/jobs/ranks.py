"""From a composition to the ranks that do its job. Imports no torch before they start."""

from __future__ import annotations

import os
from multiprocessing import forkserver, set_forkserver_preload
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cosmos3_pipeline.stages.files import remove_partial, write_whole


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """`cfg` as plain values without interpolations: what is saved, and what the ranks are sent."""
    plain = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key != "hydra"}


def on_ranks(cfg: DictConfig, output: Path, entry: str, *payload: Any, own_process: bool = False) -> None:
    """Save the resolved config in `output` and call `entry(resolved, *payload, output)` on every rank of `cfg`.

    `entry` is written "module:function", so that only the ranks import it: they take long to.
    With one rank that is this process, unless `own_process` asks for a fresh one. With RANK in the environment
    this process is the root of a world that exists already. Files half written in `output` are removed when a
    rank failed. Raises RankFailed.
    """
    plain = resolved(cfg)
    write_whole(output / "config.yaml", OmegaConf.to_yaml(plain))
    ranks = cfg.topology.nodes * cfg.topology.ranks_per_node
    if "RANK" in os.environ or (ranks == 1 and not own_process):
        call(entry, plain, *payload, str(output))
        return
    if plain["topology"]["device"] == "cpu":
        import_for_ranks(entry)  # beside what follows here
    from cosmos3_pipeline.distributed.launch import run_ranks

    try:
        run_ranks(call, entry, plain, *payload, str(output), ranks=ranks, device=plain["topology"]["device"])
    finally:
        for folder in (output, *output.glob("line_*")):  # a clip per line has a folder of its own
            remove_partial(folder)


def call(entry: str, *payload: Any) -> None:
    """Call the function `entry`, "module:function"."""
    resolve_name(entry)(*payload)


def import_for_ranks(entry: str) -> None:
    """Begin the process from which ranks on CPU are forked: it imports what they need, once for all of them.

    It stays as long as this process, for the next runs of a sweep.
    """
    set_forkserver_preload([entry.partition(":")[0]])
    forkserver.ensure_running()
