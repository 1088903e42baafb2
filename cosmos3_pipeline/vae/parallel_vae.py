"""A VAE that several ranks run together. It replaces `diffusers.AutoencoderKLWan` in any pipeline."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor
from torch.distributed import ProcessGroup

from cosmos3_pipeline.distributed.board import RunStopped
from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.distributed.ledger import Ledger
from cosmos3_pipeline.errors import Problem
from cosmos3_pipeline.vae.drop_in import DropIn, default_dtype_kept
from cosmos3_pipeline.vae.inputs import VaeInputError, latent_shape, problem_of
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.pixels import Pixels
from cosmos3_pipeline.vae.program import Direction
from cosmos3_pipeline.vae.runner import AssignedRunner
from cosmos3_pipeline.vae.strategy import Runner, Strategy, StrategyError, StrategyPlan
from cosmos3_pipeline.vae.weights import BoundVae, FolderWeights, ModuleWeights, WeightSource


@dataclass(frozen=True)
class _Call:
    """The call that a rank is about to make. Ranks compare their calls before anything is computed or sent."""

    direction: str
    shape: tuple[int, ...]
    dtype: str
    strategy: str
    assignment: int  # a digest of the assignment


@dataclass(frozen=True)
class _Refusal:
    """Why a rank cannot make its call."""

    problem: Problem
    by_strategy: bool


class ParallelVAE(DropIn):
    """Encodes and decodes with the ranks of `group`, each by its strategy; a drop-in for `AutoencoderKLWan`.

    autoencoder: the model whose weights are used. Its tensors are shared and not copied. They may be on the meta
    device in the half (encoder or decoder) that is never called.
    encode, decode: strategies.
    group: the ranks that work together. None means all ranks of an initialised `torch.distributed`, or else this
    process alone. Rank 0 of the group is the root: it hands out the frames.
    weights: the source of the weights, if it is not `autoencoder`.
    comm: the messages of `group`, if they exist already.

    Every rank of the group makes a ParallelVAE and calls the same methods with the same tensors. Bad input raises
    a ValueError on every rank. A rank that fails later raises its own error, and the others raise `PeerFailed` or
    `PeerLost` (both RuntimeError) instead of waiting for it.

    It is for inference, so results have no gradient. Input that requires grad is refused while gradients are
    enabled, and `train()` is refused.
    """

    def __init__(
        self,
        autoencoder: AutoencoderKLWan,
        encode: Strategy,
        decode: Strategy,
        group: ProcessGroup | None = None,
        *,
        weights: WeightSource | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        comm: Comm | None = None,
    ) -> None:
        super().__init__(autoencoder, weights)
        self._group = group
        self._strategies: dict[Direction, Strategy] = {"encode": encode, "decode": decode}
        for direction, strategy in self._strategies.items():
            if not isinstance(strategy, Strategy):
                raise TypeError(
                    f"{direction}={strategy!r}; a strategy is an object with its settings, not a name; give "
                    f"{direction}=Replicated() from cosmos3_plugins.replicated, or another one of the plugins"
                )
            if direction not in strategy.directions:
                raise StrategyError(
                    f"strategy {strategy.name} for {direction}",
                    f"it can {' and '.join(sorted(strategy.directions))} only",
                    f"choose another strategy for {direction}",
                )
        loaded = next((p for p in autoencoder.parameters() if not p.is_meta), None)
        self._dtype: torch.dtype = dtype or (autoencoder.dtype if loaded is None else loaded.dtype)
        if device is None:
            device = torch.device("cpu") if loaded is None else loaded.device
        # Through a tensor, so that the device has an index: a tensor's device is "cuda:0", never "cuda".
        self._device = torch.empty(0, device=device).device
        self._vae: BoundVae | None = None
        self._runners: dict[Direction, Runner] = {}
        self._honoured: dict[tuple[Direction, LatentShape], int] = {}
        self._comm = comm
        self._ledger = Ledger() if comm is None else comm.ledger

    @classmethod
    def from_folder(
        cls,
        folder: str | Path,
        encode: Strategy,
        decode: Strategy,
        group: ProcessGroup | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> ParallelVAE:
        """Open a diffusers VAE folder. Each rank reads only the weights that its ops need, when it needs them."""
        with torch.device("meta"):
            autoencoder = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(folder))
        weights = FolderWeights(Path(folder))
        return cls(autoencoder, encode, decode, group, weights=weights, dtype=dtype, device=torch.device(device))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        encode: Strategy | None = None,
        decode: Strategy | None = None,
        group: ProcessGroup | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `AutoencoderKLWan.from_pretrained`, which takes `kwargs` (subfolder, torch_dtype, variant ...).

        Every rank reads all weights; with `from_folder` a rank reads only the weights of its ops. Raises TypeError
        without `encode` or `decode`.
        """
        load = partial(AutoencoderKLWan.from_pretrained, pretrained_model_name_or_path, **kwargs)
        return cls._loaded("from_pretrained", load, encode, decode, group)

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: Any,
        *,
        encode: Strategy | None = None,
        decode: Strategy | None = None,
        group: ProcessGroup | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `AutoencoderKLWan.from_single_file`, which takes `kwargs`. Raises TypeError as `from_pretrained`."""
        load = partial(AutoencoderKLWan.from_single_file, pretrained_model_link_or_path_or_dict, **kwargs)
        return cls._loaded("from_single_file", load, encode, decode, group)

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        encode: Strategy | None = None,
        decode: Strategy | None = None,
        group: ProcessGroup | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `AutoencoderKLWan.from_config`, with random weights. Raises TypeError as `from_pretrained`."""
        load = partial(AutoencoderKLWan.from_config, config, **kwargs)
        return cls._loaded("from_config", load, encode, decode, group)

    @classmethod
    def _loaded(
        cls,
        method: str,
        load: Callable[[], Any],
        encode: Strategy | None,
        decode: Strategy | None,
        group: ProcessGroup | None,
    ) -> Any:
        """The result of `load` with its model wrapped. It is a tuple if `load` returns more than the model."""
        if encode is None or decode is None:
            missing = " and ".join(name for name, s in (("encode", encode), ("decode", decode)) if s is None)
            raise TypeError(
                f"{cls.__name__}.{method}() without {missing}; a strategy runs each direction, and none is the "
                "default; give for example encode=Replicated(), decode=LayerPipeline(), from "
                "cosmos3_plugins.replicated and cosmos3_plugins.layer_pipeline"
            )
        with default_dtype_kept():
            loaded = load()
        if isinstance(loaded, tuple):
            return cls(loaded[0], encode, decode, group), *loaded[1:]
        return cls(loaded, encode, decode, group)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it computes, and which latents and pictures must have."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """The device on which it computes, and on which latents and pictures must be."""
        return self._device

    @property
    def ledger(self) -> Ledger:
        """The messages and bytes that this rank has sent and received so far."""
        return self._ledger

    @property
    def comm(self) -> Comm:
        """The Comm of its group. It is made on first use, which is collective over the group."""
        if self._comm is None:
            self._comm = Comm(self._group, self._ledger, device=self._device)
        return self._comm

    def plan(self, direction: Direction, shape: LatentShape) -> StrategyPlan:
        """The work of each rank for a clip of `shape`. Raises StrategyError if the strategy refuses the clip."""
        program = self._bound().program(direction)
        return self._strategies[direction].plan(program, shape, self.comm.size)

    # diffusers moves an offloaded model to its device before `forward`, and before methods with this hook.
    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Latents [B, z_dim, T, h, w] -> picture [B, 3, F, H, W] in [-1, 1], on every rank of the group."""
        self._agree("decode", z)
        comm = self.comm
        program = self._bound().program("decode")
        frames = program.picture_frames(z.shape[2])
        sizes = (z.shape[3] * program.spatial, z.shape[4] * program.spatial)
        shape = (z.shape[0], program.picture_channels, frames, *sizes)

        with comm.run():
            picture = z.new_empty(shape)
            at = 0
            for chunk in self._runner("decode").stream(z, pixels="float"):
                picture[:, :, at : at + chunk.shape[2]].copy_(chunk)
                at += chunk.shape[2]
            if not self._everywhere(z):
                comm.broadcast(picture)
        return DecoderOutput(sample=picture) if return_dict else (picture,)

    def decode_stream(self, z: Tensor, *, pixels: Pixels = "uint8") -> Iterator[Tensor]:
        """Latents [1, z_dim, T, h, w] -> bytes [frames, H, W, 3] on the root, chunk by chunk as they are ready.

        With `pixels` "float" the chunks are [3, frames, H, W] in [-1, 1], as in `decode`.

        This is a generator, and nothing happens before the first `next`. The other ranks must iterate their
        generators to the end, although these yield nothing. Closing the root's generator early also ends the other
        ranks' generators. They wait while the root's generator is neither exhausted nor closed. Memory does not
        grow with the number of frames.
        """
        self._agree("decode", z, one_clip=True)
        try:
            with self.comm.run():
                for chunk in self._runner("decode").stream(z, pixels=pixels):
                    if self.comm.is_root:
                        yield chunk[0]
        except RunStopped:
            return

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Picture [B, 3, F, H, W] in [-1, 1] -> distribution of latents [B, z_dim, T, h, w], on every rank.

        As in diffusers, frames beyond the last whole chunk (1 + 4k frames) are not encoded.
        """
        self._agree("encode", x)
        with self.comm.run():
            moments = self._runner("encode").encode(x)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode to the most likely latents, or with `sample_posterior` to random latents, and decode them.

        Ranks draw the same random latents if their generators are in the same state.
        """
        (posterior,) = self.encode(sample, return_dict=False)
        latents = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(latents, return_dict=return_dict)

    def release(self, *, decode: LatentShape | None = None, encode: LatentShape | None = None) -> None:
        """Bind the weights that this rank needs for clips of these shapes, and drop all other weights.

        Each rank then holds only its own share. This empties the `autoencoder` that this VAE was made from (its
        tensors move to the meta device), and fixes dtype and device. Unless there is a `weights` source to read
        from, two kinds of calls fail afterwards: a direction without a shape, and clips for which this rank needs
        other weights.
        """
        clips: dict[Direction, LatentShape | None] = {"decode": decode, "encode": encode}
        for direction, shape in clips.items():
            if shape is not None and isinstance(runner := self._runner(direction), AssignedRunner):
                runner.bind(shape)
        self._released = True
        self.autoencoder._apply(lambda tensor: tensor.to("meta"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ParallelVAE:
        moved = fn(torch.empty(0, dtype=self._dtype, device=self._device))
        if (moved.dtype, moved.device) != (self._dtype, self._device):
            if self._released:
                raise RuntimeError(
                    f"the VAE was released as {self._dtype} on {self._device}; the weights from which "
                    f"{moved.dtype} on {moved.device} could be made are gone; move it before release()"
                )
            if moved.device != self._device and self._comm is not None:
                self._comm.close()  # its connections were made for the old device
                self._comm = None
            self._dtype, self._device = moved.dtype, moved.device
            self._unbind()
        super()._apply(lambda tensor: tensor if tensor.is_meta else fn(tensor), recurse)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's. Raises RuntimeError if this VAE does not compute with the weights of the model."""
        if self._released or self._weights is not None:
            raise RuntimeError(
                "load_state_dict() of a VAE that was released or has a source of weights; it does not compute "
                "with the weights that this sets; set those of an AutoencoderKLWan, and make a ParallelVAE of it"
            )
        keys = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._unbind()
        return keys

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """For copy and pickle. A copy binds its weights again: bound weights and messages belong to one object.

        Raises RuntimeError after release().
        """
        if self._released:
            raise RuntimeError(
                "copying or pickling a VAE after release(); this rank has kept only its own share of the weights, "
                "bound to this VAE; copy it before release()"
            )
        make = partial(type(self), weights=self._weights, dtype=self._dtype, device=self._device)
        return make, (self.autoencoder, self._strategies["encode"], self._strategies["decode"], self._group)

    def _unbind(self) -> None:
        self._vae = None
        self._runners.clear()
        self._honoured.clear()

    def _bound(self) -> BoundVae:
        if self._vae is None:
            weights = self._weights or ModuleWeights(self.autoencoder)
            self._vae = BoundVae(self.config, weights, dtype=self._dtype, device=self._device)
        return self._vae

    def _runner(self, direction: Direction) -> Runner:
        if direction not in self._runners:
            strategy = self._strategies[direction]
            self._runners[direction] = strategy.runner(self._bound(), self.comm, direction)
        return self._runners[direction]

    def _agree(self, direction: Direction, tensor: Tensor, *, one_clip: bool = False) -> None:
        """Raise the same ValueError on every rank, unless all ranks are about to make the same possible call."""
        refusal, assignment = self._refusal(direction, tensor, one_clip=one_clip)
        strategy = self._strategies[direction]
        call = _Call(direction, tuple(tensor.shape), str(tensor.dtype), f"{type(strategy).__name__}", assignment)
        calls = self.comm.agree((call, refusal))
        for rank, (_, refused) in enumerate(calls):
            if refused is not None:
                error = StrategyError if refused.by_strategy else VaeInputError
                what = refused.problem.what if len(calls) == 1 else f"rank {rank}: {refused.problem.what}"
                raise error(what, refused.problem.why, refused.problem.works)
        for rank, (other, _) in enumerate(calls):
            if other != calls[0][0]:
                raise VaeInputError(
                    f"rank {rank} calls {other} and rank 0 {calls[0][0]}",
                    "the ranks of a group work on one clip, by one assignment",
                    "give every rank the same tensor and strategy, and the same files that it reads",
                )

    def _refusal(self, direction: Direction, tensor: Tensor, *, one_clip: bool) -> tuple[_Refusal | None, int]:
        """Why this rank cannot make the call (None if it can), and the digest of the assignment."""
        program = self._bound().program(direction)
        problem = problem_of(program, tensor, dtype=self._dtype, device=self._device, one_clip=one_clip)
        if problem is not None:
            return _Refusal(problem, by_strategy=False), 0
        shape = latent_shape(program, tensor)
        try:
            # Cached, because making a plan takes milliseconds, which is noticeable for a small clip.
            honoured = (direction, shape)
            if honoured not in self._honoured:
                self._honoured[honoured] = self._digest(direction, shape)
            return None, self._honoured[honoured]
        except StrategyError as error:
            return _Refusal(error.problem, by_strategy=True), 0

    def _digest(self, direction: Direction, shape: LatentShape) -> int:
        """A digest of the assignment. Raises StrategyError if the strategy refuses the clip."""
        strategy = self._strategies[direction]
        if type(strategy).runner is not Strategy.runner:
            # Its runner may bind weights at once, so the plan must accept the clip first.
            return zlib.crc32(repr((strategy, self.plan(direction, shape).shares)).encode())
        runner = self._runner(direction)
        assert isinstance(runner, AssignedRunner)
        return zlib.crc32(repr(runner.lowered(shape).assignment.blocks).encode())

    def _everywhere(self, z: Tensor) -> bool:
        """Whether each rank computes the whole picture by itself."""
        runner = self._runner("decode")
        if not isinstance(runner, AssignedRunner):
            return False
        return runner.lowered(latent_shape(self._bound().program("decode"), z)).everywhere
