"""The interface of diffusers' VAE beside `encode` and `decode`: loading, saving, copying, refused switches.

A pipeline reads `__class__` and `__module__` of each component, writes both into `model_index.json`, and calls the
component's `save_pretrained`. `DropIn` answers as `AutoencoderKLWan`, with that model's weights under that model's
names, so what is saved opens with diffusers alone.
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

# A modular pipeline takes a component's class from `__class__` only when it has a load id. The four places of this
# one (repository, subfolder, variant, revision) are empty: nothing is known about where the model came from.
UNKNOWN_LOAD_ID = "null|null|null|null"

# Why a switch of AutoencoderKLWan is refused, and what would work instead.
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
    """A method `name` that raises NotImplementedError, saying why it cannot work and what would."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name}() of a ParallelVAE; {because[0]}; {because[1]}")

    refuse.__name__ = refuse.__qualname__ = name
    refuse.__doc__ = f"Raises NotImplementedError: {because[0]}."
    return refuse


@contextmanager
def default_dtype_kept() -> Iterator[None]:
    """Restore torch's default dtype, which diffusers changes while it loads and leaves so when loading fails."""
    dtype = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)


class DropIn(ModelMixin, ConfigMixin):  # type: ignore[misc] # diffusers is untyped
    """Stands in for `autoencoder`. Has its submodules, so parameters and `state_dict()` have the same names.

    weights: as in `ParallelVAE`.
    """

    config_name = "config.json"
    autoencoder: AutoencoderKLWan

    def __init__(self, autoencoder: AutoencoderKLWan, weights: WeightSource | None) -> None:
        super().__init__()
        self.__dict__["autoencoder"] = autoencoder  # as a submodule it would give each weight a second name
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
        # isinstance(vae, AutoencoderKLWan) is true through this; SanaVideoPipeline scales the latents only then.
        return AutoencoderKLWan

    def _get_name(self) -> str:
        return type(self).__name__  # torch shows __class__

    @wraps(AutoencoderKLWan.save_pretrained)  # pipelines look in the signature for what to pass on
    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Write the folder that the AutoencoderKLWan would write, in the present dtype. On one rank only.

        Raises RuntimeError after release(), and ValueError where weights were never loaded.
        """
        self._whole().save_pretrained(*args, **kwargs)

    def _whole(self) -> AutoencoderKLWan:
        """A model with every weight, in the present dtype on CPU; memory is shared where nothing has to change."""
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
        """Raises NotImplementedError for True: it is always as after `eval()`."""
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
        """Do nothing: no call keeps anything for the next one."""

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
