"""The sources of ops' weights: a model in memory, or a checkpoint from which a rank reads only what it needs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cosmos3_pipeline.distributed.host_path import takes_host_path
from cosmos3_pipeline.vae.bound_ops import BoundOp, bind
from cosmos3_pipeline.vae.host_memory import keep_freed_memory
from cosmos3_pipeline.vae.ops import Op
from cosmos3_pipeline.vae.program import Direction, Program, program_for


class WeightSource(Protocol):
    """Tensors by their names in `AutoencoderKLWan.state_dict()`."""

    def load(self, names: Iterable[str], *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The named tensors, in `dtype` on `device`. Raises ValueError if a tensor is missing."""
        ...


class ModuleWeights:
    """The weights of an `AutoencoderKLWan`. They are copied only if dtype or device differ."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def load(self, names: Iterable[str], *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Raises ValueError for a weight that was not loaded (it is on the meta device, or its half is None)."""
        state = self._module.state_dict()
        tensors = {}
        for name in names:
            tensor = state.get(name)
            if tensor is None or tensor.is_meta:
                where = "not in the model" if tensor is None else "on the meta device"
                raise ValueError(
                    f"the VAE's weight {name} is {where}; it was not loaded, was released, or is offloaded layer "
                    "by layer; load the half of the VAE that this call needs"
                )
            tensors[name] = tensor.to(device, dtype)
        return tensors


class FolderWeights:
    """The weights of a diffusers VAE folder (`config.json` and safetensors). Each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = folder / "diffusion_pytorch_model.safetensors.index.json"
        single = folder / "diffusion_pytorch_model.safetensors"
        if index.is_file():
            files = json.loads(index.read_text())["weight_map"]
            self._files: dict[str, Path] = {name: folder / file for name, file in files.items()}
        elif single.is_file():
            from safetensors import safe_open

            with safe_open(single, framework="pt") as weights:
                self._files = dict.fromkeys(weights.keys(), single)
        else:
            raise FileNotFoundError(
                f"{folder} has no {single.name}; a diffusers VAE folder holds that file or its index; "
                "give the `vae` folder of a diffusers checkpoint"
            )

    def load(self, names: Iterable[str], *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Raises ValueError if the checkpoint lacks a tensor."""
        from safetensors import safe_open

        names = list(names)
        missing = [name for name in names if name not in self._files]
        if missing:
            raise ValueError(
                f"{self._folder} lacks {len(missing)} of {len(names)} weights that this rank needs, such as "
                f"{missing[0]}; config.json describes another VAE than the one whose weights are beside it, or "
                "some were lost; give the `vae` folder of a diffusers checkpoint as it was saved"
            )
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        tensors = {}
        for path, wanted in by_file.items():
            with safe_open(path, framework="pt") as weights:
                for name in wanted:
                    tensors[name] = weights.get_tensor(name).to(device, dtype)
        return tensors


class BoundVae:
    """A VAE in the form that strategies use: its programs, and ops with their weights.

    `config` has the names and values of `AutoencoderKLWan.config`.
    """

    def __init__(
        self, config: Mapping[str, Any], source: WeightSource, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dtype = dtype
        self.device = device
        self._config = config
        self._source = source
        self._programs: dict[Direction, Program] = {}

    def program(self, direction: Direction) -> Program:
        """The ops of `direction`."""
        if direction not in self._programs:  # cached: building it takes as long as several small ops
            self._programs[direction] = program_for(direction, self._config)
        return self._programs[direction]

    def autoencoder(self, direction: Direction) -> Any:
        """diffusers' `AutoencoderKLWan` with the weights of `direction`; its other half has none."""
        from diffusers import AutoencoderKLWan

        with torch.device("meta"):
            autoencoder = AutoencoderKLWan.from_config(self._config)
        names = [weight.name for op in self.program(direction).ops for weight in op.weights]
        weights = self._source.load(names, dtype=self.dtype, device=self.device)
        autoencoder.load_state_dict(weights, strict=False, assign=True)
        return autoencoder.eval().requires_grad_(False)

    def bind(self, direction: Direction, numbers: Iterable[int]) -> dict[int, BoundOp[Op]]:
        """The ops `numbers` of `direction`, with their weights, which are read here."""
        if takes_host_path(self.device):
            keep_freed_memory()
        ops = self.program(direction).ops
        numbers = list(numbers)
        names = [weight.name for number in numbers for weight in ops[number].weights]
        weights = self._source.load(names, dtype=self.dtype, device=self.device)
        bound = {}
        for number in numbers:
            # One op at a time, because an accelerator changes the weights' memory layout: only the weights of one
            # op are then in memory twice.
            own = {weight.name: weights.pop(weight.name) for weight in ops[number].weights}
            bound[number] = bind(number, ops[number], own)
            del own
        return bound
