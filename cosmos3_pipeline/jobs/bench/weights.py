"""The random VAE that every contestant runs, and how many bytes of it a strategy reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from cosmos3_pipeline.models.toy import make_vae
from cosmos3_pipeline.vae.weights import ModuleWeights


class Autoencoders:
    """One random `AutoencoderKLWan` of these dimensions, the same on every rank, made when it is first needed."""

    def __init__(self, dimensions: Mapping[str, Any], device: torch.device) -> None:
        self._dimensions = dimensions
        self._device = device
        self._models: dict[torch.dtype, AutoencoderKLWan] = {}

    def model(self, dtype: torch.dtype) -> AutoencoderKLWan:
        """The VAE in `dtype`. Not to be changed: for that take a `view`."""
        if dtype not in self._models:
            if dtype == torch.float32:
                self._models[dtype] = make_vae(self._dimensions).to(self._device)
            else:
                self._models[dtype] = self._like(self.model(torch.float32), dtype)
        return self._models[dtype]

    def view(self, dtype: torch.dtype) -> AutoencoderKLWan:
        """A VAE with modules of its own and the weights of `model(dtype)`."""
        return self._like(self.model(dtype), dtype)

    def keep_only(self, dtype: torch.dtype) -> None:
        """Forget the weights in other dtypes, but for float32, of which they are made."""
        self._models = {kept: model for kept, model in self._models.items() if kept in (dtype, torch.float32)}

    @staticmethod
    def _like(model: AutoencoderKLWan, dtype: torch.dtype) -> AutoencoderKLWan:
        with torch.device("meta"):
            other = AutoencoderKLWan.from_config(model.config)
        other.load_state_dict({k: v.to(dtype) for k, v in model.state_dict().items()}, assign=True)
        return other.eval().requires_grad_(False)


class CountedWeights:
    """The weights of `model`, and the bytes of those that were asked for."""

    def __init__(self, model: AutoencoderKLWan) -> None:
        self._weights = ModuleWeights(model)
        self.nbytes = 0

    def load(self, names: Iterable[str], *, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The named tensors, in `dtype` on `device`."""
        tensors = self._weights.load(names, dtype=dtype, device=device)
        self.nbytes += sum(tensor.nbytes for tensor in tensors.values())
        return tensors
