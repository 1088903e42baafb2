"""A checkpoint's own numbers in the place of those of the model option that names it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from cosmos3_pipeline.checkpoint.hub import local_folder
from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo, inspect_checkpoint


@dataclass(frozen=True)
class Adopted:
    """A checkpoint whose numbers a config has taken over; `changed` has a line for each that was another one."""

    checkpoint: CheckpointInfo
    changed: tuple[str, ...]


def adopt_checkpoint(cfg: DictConfig) -> Adopted | None:
    """Put the numbers of the checkpoint `cfg.model.path` in the place of the model option's.

    Checks, plans and the saved config are then about the model that runs. None without a checkpoint here: no path,
    or a hub id that is not in the hub's cache.

    Raises:
        Refusal: see `inspect_checkpoint`.
    """
    model = cfg.model
    folder = None if model.path is None else local_folder(model.path, model.commit or model.revision)
    if folder is None:
        return None
    info = inspect_checkpoint(folder)
    changed = []
    for node, key, found in _numbers(cfg, info):
        option, node[key] = node[key], found
        if node[key] != option:
            changed.append(f"{node._get_full_key(key)}={found}, not {option}")
    return Adopted(info, tuple(changed))


def _numbers(cfg: DictConfig, info: CheckpointInfo) -> Iterator[tuple[DictConfig, str, Any]]:
    """Node, key and value of what the checkpoint says."""
    for node, values in ((cfg.model.transformer, info.transformer), (cfg.model.vae, info.vae)):
        for key in node:
            if values.get(key) is not None:
                yield node, str(key), values[key]
    if info.sampler.native_flow_shift is not None:
        for modality in ("video", "image"):
            yield cfg.model.recommended[modality], "flow_shift", info.sampler.native_flow_shift
