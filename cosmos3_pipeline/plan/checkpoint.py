"""Looking at a checkpoint before anything heavy: which files it has, whose they are, how large. Imports no torch.

A Cosmos3 checkpoint is a diffusers folder: `model_index.json` and one subfolder per component.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from cosmos3_pipeline.checkpoint.hub import local_folder
from cosmos3_pipeline.errors import Refusal

INDEX = "model_index.json"
PIPELINE = "Cosmos3OmniPipeline"
SCHEDULER = "UniPCMultistepScheduler"
WEIGHTS = "diffusion_pytorch_model.safetensors"
# Folder of each component -> its config file and the class that must be named there; a tokenizer's may vary.
COMPONENTS = {
    "transformer": ("config.json", "Cosmos3OmniTransformer"),
    "vae": ("config.json", "AutoencoderKLWan"),
    "scheduler": ("scheduler_config.json", SCHEDULER),
    "text_tokenizer": ("tokenizer_config.json", None),
}
WITH_WEIGHTS = ("transformer", "vae")
# diffusers' Cosmos3 blocks count latents with these where the VAE is not loaded yet.
COMPRESSION = {"scale_factor_temporal": 4, "scale_factor_spatial": 16}

_LFS_POINTER = b"version "  # as a length it would be absurd


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint folder holds. `weight_files` and `weight_bytes` are per component with weights."""

    folder: Path
    index: Mapping[str, Any]  # model_index.json
    transformer: Mapping[str, Any]  # config.json of the transformer
    vae: Mapping[str, Any]  # config.json of the VAE
    weight_files: Mapping[str, tuple[Path, ...]]
    weight_bytes: Mapping[str, int]


def inspect_checkpoint(path: str | Path) -> CheckpointInfo:
    """What the diffusers folder at `path` holds; reads configs and the headers of weight files only.

    Raises:
        Refusal: no folder, not a Cosmos3 checkpoint, or files that are missing or not whole.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise Refusal(
            what=f"there is no checkpoint at {path}",
            why=f"{folder.absolute()} {'is a file' if folder.exists() else 'does not exist'}",
            works="model.path=FOLDER with a diffusers folder of Cosmos3, or model=toy",
        )
    if not (folder / INDEX).is_file():
        inside = sorted(p.parent.name for p in folder.glob(f"*/{INDEX}"))
        raise Refusal(
            what=f"{folder} is not a diffusers folder",
            why=f"it has no {INDEX}",
            works=f"model.path={folder / inside[0]}" if inside else f"the folder that holds {INDEX}",
        )
    index = _read_json(folder / INDEX)
    if index.get("_class_name") != PIPELINE:
        raise Refusal(
            what=f"{folder} holds a {index.get('_class_name')}",
            why=f"its components and their call differ from those of a {PIPELINE}",
            works="a Cosmos3 checkpoint in diffusers' layout, such as nvidia/Cosmos3-Nano",
        )
    configs = {name: _component_config(folder, name) for name in COMPONENTS}
    _check_compression(folder, configs["vae"])
    files = {name: _weight_files(folder / name) for name in WITH_WEIGHTS}
    return CheckpointInfo(
        folder=folder,
        index=index,
        transformer=configs["transformer"],
        vae=configs["vae"],
        weight_files=files,
        weight_bytes={name: sum(_weights_in(file) for file in files[name]) for name in WITH_WEIGHTS},
    )


def adopt_dimensions(cfg: DictConfig) -> list[str]:
    """Put the dimensions of the checkpoint at `cfg.model.path` in the place of the model option's.

    Checks, plans and the saved config are then about the model that runs. Returns one line per dimension that
    was another one. Without a checkpoint here (no path, a hub id that is not in the cache, nothing there) nothing
    changes: `check_start` says so before a run.
    """
    model = cfg.model
    folder = None if model.path is None else local_folder(model.path, model.commit or model.revision)
    if folder is None or not (folder / INDEX).is_file():
        return []
    try:
        info = inspect_checkpoint(folder)
    except Refusal:
        return []
    changed = []
    for name, found in (("transformer", info.transformer), ("vae", info.vae)):
        node = cfg.model[name]
        for key in node:
            if found.get(key) is None:
                continue
            option = node[key]
            node[key] = found[key]
            if node[key] != option:
                changed.append(f"model.{name}.{key}={found[key]}, not {option}")
    return changed


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _not_whole(file, f"it is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise _not_whole(file, f"it holds a {type(content).__name__} where settings belong")
    return content


def _component_config(folder: Path, name: str) -> dict[str, Any]:
    file, class_name = COMPONENTS[name]
    if not (folder / name / file).is_file():
        raise Refusal(
            what=f"{folder} has no {name}/{file}",
            why=f"a {PIPELINE} needs its {name}",
            works="the whole checkpoint: the download may have ended early, or left out subfolders",
        )
    config = _read_json(folder / name / file)
    found = config.get("_class_name")
    if name == "scheduler" and found != class_name:
        raise Refusal(
            what=f"the sampler of {folder} is a {found}",
            why=f"only {class_name} is run here: distilled checkpoints have fixed steps of their own, and the "
            "sampler class of Edge checkpoints is not in diffusers 0.42",
            works=f"a checkpoint whose scheduler is a {class_name}, such as nvidia/Cosmos3-Nano",
        )
    if class_name is not None and found != class_name:
        raise Refusal(
            what=f"{name}/{file} in {folder} names the class {found}",
            why=f"the {name} of Cosmos3 is a {class_name}",
            works="a Cosmos3 checkpoint in diffusers' layout, such as nvidia/Cosmos3-Nano",
        )
    return config


def _check_compression(folder: Path, vae: Mapping[str, Any]) -> None:
    for key, expected in COMPRESSION.items():
        if vae.get(key) != expected:
            raise Refusal(
                what=f"the VAE of {folder} has {key}={vae.get(key)}",
                why=f"the VAE of Cosmos3 is Wan2.2's, with {key}={expected}",
                works="a Cosmos3 checkpoint in diffusers' layout, such as nvidia/Cosmos3-Nano",
            )


def _weight_files(component: Path) -> tuple[Path, ...]:
    """The safetensors files of a component: one, or the shards that its index names."""
    index = component / f"{WEIGHTS}.index.json"
    if not index.is_file():
        if not (component / WEIGHTS).is_file():
            raise Refusal(
                what=f"{component} has no weights",
                why=f"there is neither {WEIGHTS} nor {index.name}",
                works="the whole checkpoint: the download may have ended early",
            )
        return (component / WEIGHTS,)
    names = sorted(set(_read_json(index).get("weight_map", {}).values()))
    missing = [name for name in names if not (component / name).is_file()]
    if missing or not names:
        raise Refusal(
            what=f"{component} has {len(names) - len(missing)} of {len(names)} weight files",
            why=f"{index.name} names {missing[0]}, which is not there" if missing else f"{index.name} names none",
            works="the whole checkpoint: the download may have ended early",
        )
    return tuple(component / name for name in names)


def _weights_in(file: Path) -> int:
    """Bytes of the tensors in a safetensors file, read from its header; the file must be that long.

    Source: the safetensors format: 8 bytes of header length, a JSON header, then the tensors.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == _LFS_POINTER:
            raise _not_whole(file, "it is a git-lfs pointer, not the weights themselves")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise _not_whole(file, f"it ends after {size} bytes, within its header")
        header = json.loads(stream.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    tensors = max(ends, default=0)
    if 8 + length + tensors != size:
        raise _not_whole(file, f"it has {size} bytes, its header speaks of {8 + length + tensors}")
    return int(tensors)


def _not_whole(file: Path, why: str) -> Refusal:
    return Refusal(what=f"{file} is not whole", why=why, works="downloading it again (git-lfs: `git lfs pull`)")
