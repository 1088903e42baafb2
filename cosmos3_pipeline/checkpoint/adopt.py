"""A checkpoint's own numbers in the place of those of the model option that names it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from cosmos3_pipeline.checkpoint.hub import local_folder
from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo, inspect_checkpoint
from cosmos3_pipeline.config.plain import flat
from cosmos3_pipeline.config.schema import Config


@dataclass(frozen=True)
class Adopted:
    """A checkpoint, and its `numbers` by the dotted keys of the config in whose place they go.

    `changed` has a line for each that is another one than the model option's.
    """

    checkpoint: CheckpointInfo
    numbers: dict[str, Any]
    changed: tuple[str, ...]


def adopt_checkpoint(cfg: Config) -> Adopted | None:
    """The numbers of the checkpoint `cfg.model.path`, to be put in the place of the model option's.

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
    numbers, option = dict(_numbers(cfg, info)), flat(cfg)
    changed = [f"{key}={found}, not {option[key]}" for key, found in numbers.items() if found != option[key]]
    return Adopted(info, numbers, tuple(changed))


def _numbers(cfg: Config, info: CheckpointInfo) -> Iterator[tuple[str, Any]]:
    """Key and value of what the checkpoint says."""
    model = cfg.model
    for name, node, values in (("transformer", model.transformer, info.transformer), ("vae", model.vae, info.vae)):
        for field in fields(node):
            if values.get(field.name) is not None:
                yield f"model.{name}.{field.name}", values[field.name]
    if info.sampler.native_flow_shift is not None:
        for modality in ("video", "image"):
            yield f"model.recommended.{modality}.flow_shift", info.sampler.native_flow_shift
