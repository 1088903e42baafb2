"""Replace the numbers of the model option by the numbers of the checkpoint that it names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from cosmos3_pipeline.checkpoint.hub import components_for, local_folder
from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo, inspect_checkpoint
from cosmos3_pipeline.config.plain import flat
from cosmos3_pipeline.config.schema import Config
from cosmos3_pipeline.errors import Refusal


@dataclass(frozen=True)
class Adopted:
    """A checkpoint, and its `numbers` by the dotted key of the config that each replaces.

    `changed` has a line for each number that differs from the model option's.
    """

    checkpoint: CheckpointInfo
    numbers: dict[str, Any]
    changed: tuple[str, ...]


def adopt_checkpoint(cfg: Config) -> Adopted | None:
    """The numbers of the checkpoint `cfg.model.path`, which replace the model option's.

    Checks, plans and the saved config then describe the model that runs. Returns None without a local checkpoint:
    there is no path, or the path is a hub id that is not in the hub's cache.

    Raises:
        Refusal: see `inspect_checkpoint`; or the model option is distilled, and the checkpoint is not.
    """
    model = cfg.model
    if model.path is None:
        return None
    components = components_for(sound=cfg.task.sound)
    folder = local_folder(model.path, model.commit or model.revision, components=components)
    if folder is None:
        return None
    info = inspect_checkpoint(folder, sound=cfg.task.sound)
    if model.distilled_sigmas is not None and info.sampler.distilled_sigmas is None:
        raise Refusal(
            what=f"model.path={model.path} with model={model.name}, which is distilled to "
            f"{len(model.distilled_sigmas)} steps",
            why=f"the checkpoint is not distilled: its {info.sampler.class_name} needs more steps, and guidance",
            works="a distilled checkpoint, or the model option that the folder was made for, such as model=super",
        )
    numbers, option = dict(_numbers(cfg, info)), flat(cfg)
    changed = [f"{key}={found}, not {option[key]}" for key, found in numbers.items() if found != option[key]]
    return Adopted(info, numbers, tuple(changed))


def _numbers(cfg: Config, info: CheckpointInfo) -> Iterator[tuple[str, Any]]:
    """Dotted key and value of each number of the checkpoint."""
    model = cfg.model
    for name, node, values in (("transformer", model.transformer, info.transformer), ("vae", model.vae, info.vae)):
        for field in fields(node):
            if values.get(field.name) is not None:
                yield f"model.{name}.{field.name}", values[field.name]
    if info.sound_tokenizer is not None:
        yield "model.sound_tokenizer.dec_dim", info.sound_tokenizer["dec_dim"]
    sigmas = info.sampler.distilled_sigmas
    if sigmas is not None:
        yield "model.distilled_sigmas", list(sigmas)
        for modality in ("video", "image"):
            yield f"model.recommended.{modality}.steps", len(sigmas)
            yield f"model.recommended.{modality}.guidance_scale", 1.0
            yield f"model.recommended.{modality}.flow_shift", None
        return
    schedule = {**info.sampler.settings_for(None), "native_grid": info.sampler.native_grid}
    for field in fields(model.schedule):
        yield f"model.schedule.{field.name}", schedule[field.name]
    if info.sampler.native_flow_shift is not None:
        for modality in ("video", "image"):
            yield f"model.recommended.{modality}.flow_shift", info.sampler.native_flow_shift
