"""Small checkpoints in the published layouts, and opening one as a run does: configs, tokenizer, every weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from cosmos3_pipeline.checkpoint.inspect import CheckpointInfo, inspect_checkpoint
from cosmos3_pipeline.checkpoint.weights import Part
from cosmos3_pipeline.models.layouts import LAYOUTS
from cosmos3_pipeline.models.loading import load_scheduler, load_vae
from cosmos3_pipeline.models.make_checkpoint import numbers_of
from cosmos3_pipeline.models.maker import write_checkpoint
from cosmos3_pipeline.models.reading import read_tensors
from cosmos3_pipeline.models.tokenizer import load_tokenizer

# The parts of a transformer that every task reads.
TRANSFORMER_PARTS = (Part.TEXT, Part.VISION)


def make_layout(folder: Path, name: str, **settings: Any) -> Path:
    """A small checkpoint of the layout `name` in the new `folder`, its VAE narrower than the toy's."""
    layout = LAYOUTS[name]
    numbers = numbers_of(layout, full_size=False)
    numbers["vae"] |= {"base_dim": 8, "decoder_base_dim": 8}
    write_checkpoint(folder, layout, **{**numbers, **settings})
    return folder


def open_whole(folder: Path) -> CheckpointInfo:
    """Everything that a run may read of a checkpoint, on the CPU. Raises Refusal."""
    info = inspect_checkpoint(folder)
    cpu = torch.device("cpu")
    load_tokenizer(info)
    load_scheduler(info.sampler, flow_shift=None).set_timesteps(4)
    read_tensors(info.parts("transformer", TRANSFORMER_PARTS), dtype=torch.float32, device=cpu)
    load_vae(info, dtype=torch.float32, device=cpu, encoder=True)
    return info


def edit(file: Path, **changes: object) -> None:
    """Change keys of a JSON file; None keeps a key with the value null."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def drop(file: Path, *keys: str) -> None:
    """Remove keys of a JSON file."""
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in keys}))
