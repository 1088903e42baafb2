"""LoRA adapters as diffusers and peft make them, and the weights that these merge them into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import Cosmos3OmniTransformer
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "pytorch_lora_weights.safetensors"
# Both pathways, and outside of the layers a layer with a bias and one that stays in float32.
TARGETS = [
    "to_q",
    "to_v",
    "add_k_proj",
    "to_add_out",
    "mlp_moe_gen.down_proj",
    "proj_in",
    "time_embedder.linear_2",
]


def make_adapter(checkpoint: Path, folder: Path, *, seed: int = 0, spread: float = 0.1, **settings: Any) -> Path:
    """An adapter of random values for the transformer of `checkpoint`, as diffusers saves it into `folder`."""
    model = Cosmos3OmniTransformer.from_pretrained(checkpoint / "transformer")
    model.add_adapter(LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **settings}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * spread
    model.save_lora_adapter(folder)
    return folder


def merge(model: Cosmos3OmniTransformer, adapters: Sequence[tuple[Path, float]]) -> None:
    """diffusers' own merge of adapters, each a folder and a weight, into `model`."""
    if not adapters:
        return
    names = [f"adapter_{number}" for number in range(len(adapters))]
    for name, (folder, _) in zip(names, adapters, strict=True):
        model.load_lora_adapter(folder, prefix=None, weight_name=FILE, adapter_name=name)
    model.set_adapters(names, weights=[weight for _, weight in adapters])
    model.fuse_lora(adapter_names=names)
    model.unload_lora()


def contents(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of an adapter, and the metadata of its file."""
    with safe_open(folder / FILE, "pt") as opened:
        return load_file(folder / FILE), dict(opened.metadata())


def write(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """A file of an adapter in the new `folder`."""
    folder.mkdir()
    save_file(dict(tensors), folder / FILE, None if metadata is None else dict(metadata))
    return folder
