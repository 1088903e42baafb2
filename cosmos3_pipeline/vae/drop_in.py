"""The interface of diffusers' VAE without `encode` and `decode`: save, copy, and refused switches.

A pipeline reads `__class__` and `__module__` of each component, writes both into `model_index.json`, and calls the
component's `save_pretrained`. `DropIn` presents itself as `AutoencoderKLWan`, with the same weights under the same
names. diffusers alone can therefore open a saved pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Self

import torch
from diffusers import AutoencoderKLWan
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from cosmos3_pipeline.vae.weights import ModuleWeights, WeightSource

# A modular pipeline uses a component's `__class__` only if the component has a load id. The four fields of this
# load id (repository, subfolder, variant, revision) are empty, because the origin of the model is unknown.
UNKNOWN_LOAD_ID = "null|null|null|null"

# For each switch of AutoencoderKLWan: why it is refused, and what works instead.
CHOSEN = "a strategy divides the work, and is chosen when the VAE is made"
TILED = (
    CHOSEN,
    "make it with decode=Tiled() from cosmos3_plugins.tiled; LayerPipeline() and SpatialShard() save memory too, "
    "and keep the picture as it is without tiles",
)
SLICED = (
    CHOSEN,
    "decode the clips of a batch one after the other; or make it with decode=LayerPipeline() from "
    "cosmos3_plugins.layer_pipeline or SpatialShard() from cosmos3_plugins.spatial_shard, which share out memory",
)
SHARED_OUT = (CHOSEN, "give encode=..., decode=... and group=... to ParallelVAE")
OFFLOADED = (
    "strategies bind the weights once and never call the layers on which diffusers would put its hooks",
    "leave it out with exclude_modules='vae', move all of it with .to(...), or have each rank read only its "
    "share: ParallelVAE.from_folder(..., decode=LayerPipeline()), from cosmos3_plugins.layer_pipeline",
)
CAST = (OFFLOADED[0], "compute in a narrower dtype: .to(torch.bfloat16)")
ATTENTION = (
    "its attention is torch's scaled_dot_product_attention, and there is no other",
    "choose torch's kernel with torch.nn.attention.sdpa_kernel",
)
TRAINED = (
    "no strategy computes gradients or dropout",
    "train the AutoencoderKLWan, then make a ParallelVAE of it",
)


def _refused(name: str, because: tuple[str, str]) -> Callable[..., Any]:
    """A method `name` that raises NotImplementedError, which says why it cannot work and what works instead."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name}() of a ParallelVAE; {because[0]}; {because[1]}")

    refuse.__name__ = refuse.__qualname__ = name
    refuse.__doc__ = f"Raises NotImplementedError: {because[0]}."
    return refuse


@contextmanager
def default_dtype_kept() -> Iterator[None]:
    """Restore torch's default dtype, which diffusers changes while it loads, and leaves changed after an error."""
    dtype = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


class DropIn(ModelMixin, ConfigMixin):  # type: ignore[misc] # diffusers is untyped
    """Replaces `autoencoder`. Has the same submodules, so parameters and `state_dict()` have the same names.

    weights: as in `ParallelVAE`.
    """

    config_name = "config.json"
    autoencoder: AutoencoderKLWan

    def __init__(self, autoencoder: AutoencoderKLWan, weights: WeightSource | None) -> None:
        super().__init__()
        self.__dict__["autoencoder"] = autoencoder  # not a submodule, because each weight would get a second name
        for name, child in autoencoder.named_children():
            self.add_module(name, child)
        self.training = False
        self._weights = weights
        self._released = False
        self._internal_dict = autoencoder._internal_dict
        self._diffusers_load_id: str = getattr(autoencoder, "_diffusers_load_id", UNKNOWN_LOAD_ID)
        self.__module__ = AutoencoderKLWan.__module__
        # Attributes of AutoencoderKLWan that pipelines read beside its config.
        self.z_dim: int = autoencoder.z_dim
        self.temperal_downsample: Sequence[bool] = autoencoder.temperal_downsample
        self.temperal_upsample: Sequence[bool] = autoencoder.temperal_upsample
        self.spatial_compression_ratio: int = autoencoder.spatial_compression_ratio

    @property  # type: ignore[misc] # torch and diffusers only read it
    def __class__(self) -> Any:
        # Makes isinstance(vae, AutoencoderKLWan) true, because SanaVideoPipeline scales latents only in this case.
        return AutoencoderKLWan

    def _get_name(self) -> str:
        return type(self).__name__  # torch's default would show __class__

    @wraps(AutoencoderKLWan.save_pretrained)  # pipelines read the signature to decide which arguments to pass
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Write the folder that the AutoencoderKLWan would write, in the present dtype. On one rank only.

        Raises RuntimeError after release(), and ValueError where weights were never loaded.
        """
        self._whole().save_pretrained(*args, **kwargs)

    def _whole(self) -> AutoencoderKLWan:
        """A model with every weight, in the present dtype on CPU. Weights that need no conversion are shared."""
        if self._released:
            raise RuntimeError(
                "saving a VAE after release(); this rank has kept only its own share of the weights; save it "
                "before release(), or save the AutoencoderKLWan that it came from"
            )
        with torch.device("meta"):
            whole = AutoencoderKLWan.from_config(self.config)
        source = self._weights or ModuleWeights(self.autoencoder)
        weights = source.load(whole.state_dict(), dtype=self.dtype, device=torch.device("cpu"))
        whole.load_state_dict(weights, assign=True)
        return whole

    def train(self, mode: bool = True) -> Self:
        """Raises NotImplementedError for True, because the VAE is always in eval mode."""
        if mode:
            _refused("train", TRAINED)(self)
        return super().train(False)  # type: ignore[no-any-return]

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Raises NotImplementedError for True."""
        if requires_grad:
            _refused("requires_grad_", TRAINED)(self)
        return super().requires_grad_(False)  # type: ignore[no-any-return]

    @property
    def use_tiling(self) -> bool:
        """False; setting it raises NotImplementedError, as `enable_tiling()` does."""
        return False

    @use_tiling.setter
    def use_tiling(self, on: bool) -> None:
        if on:
            self.enable_tiling()

    @property
    def use_slicing(self) -> bool:
        """False; setting it raises NotImplementedError, as `enable_slicing()` does."""
        return False

    @use_slicing.setter
    def use_slicing(self, on: bool) -> None:
        if on:
            self.enable_slicing()

    def disable_tiling(self) -> None:
        """Do nothing: tiles cannot be on."""

    def disable_slicing(self) -> None:
        """Do nothing: slicing cannot be on."""

    def clear_cache(self) -> None:
        """Do nothing, because no call keeps a cache for the next call."""

    enable_tiling = _refused("enable_tiling", TILED)
    tiled_encode = _refused("tiled_encode", TILED)
    tiled_decode = _refused("tiled_decode", TILED)
    blend_v = _refused("blend_v", TILED)
    blend_h = _refused("blend_h", TILED)
    enable_slicing = _refused("enable_slicing", SLICED)
    enable_parallelism = _refused("enable_parallelism", SHARED_OUT)
    enable_group_offload = _refused("enable_group_offload", OFFLOADED)
    enable_layerwise_casting = _refused("enable_layerwise_casting", CAST)
    enable_gradient_checkpointing = _refused("enable_gradient_checkpointing", TRAINED)
    enable_xformers_memory_efficient_attention = _refused("enable_xformers_memory_efficient_attention", ATTENTION)
    enable_npu_flash_attention = _refused("enable_npu_flash_attention", ATTENTION)
    enable_xla_flash_attention = _refused("enable_xla_flash_attention", ATTENTION)
    set_attention_backend = _refused("set_attention_backend", ATTENTION)
