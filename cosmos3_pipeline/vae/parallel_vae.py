"""A VAE that several ranks run together, in place of `diffusers.AutoencoderKLWan` in any pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor
from torch.distributed import ProcessGroup

from cosmos3_pipeline.distributed.board import RunStopped
from cosmos3_pipeline.distributed.comm import Comm
from cosmos3_pipeline.distributed.ledger import Ledger
from cosmos3_pipeline.distributed.root_tensor import RootTensor
from cosmos3_pipeline.vae.inputs import VaeInputError, latent_shape, problem_of
from cosmos3_pipeline.vae.program import Direction
from cosmos3_pipeline.vae.strategy import LatentShape, Runner, Strategy, StrategyError, StrategyPlan
from cosmos3_pipeline.vae.weights import BoundVae, FolderWeights, ModuleWeights, WeightSource


@dataclass(frozen=True)
class _Call:
    """What a rank is about to do; compared between the ranks before anything is computed or sent."""

    direction: str
    shape: tuple[int, ...]
    dtype: str
    strategy: str


@dataclass(frozen=True)
class _Refusal:
    """Why a rank cannot do it."""

    message: str
    by_strategy: bool


class ParallelVAE(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Encodes and decodes with the ranks of `group`, each by its strategy; a drop-in for `AutoencoderKLWan`.

    autoencoder: the model whose weights are used; its tensors are shared, not copied, and may be on the meta
    device in the half that is never called. encode, decode: strategies. group: the ranks that work together;
    None means all ranks of an initialised `torch.distributed`, else this process alone. Its rank 0 is the root.
    weights: where to take the weights from, if not from `autoencoder`.

    Every rank of the group makes one and calls the same methods with the same tensors. Bad input raises a
    ValueError on every rank. A rank that fails later raises its own error, and the others raise `PeerFailed` or
    `PeerLost` (both RuntimeError) instead of waiting for it.
    """

    config_name = "config.json"

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
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self._internal_dict = autoencoder._internal_dict
        # Attributes of AutoencoderKLWan that diffusers pipelines read beside its config.
        self.z_dim: int = autoencoder.z_dim
        self.temperal_downsample: Sequence[bool] = autoencoder.temperal_downsample
        self._group = group
        self._strategies: dict[Direction, Strategy] = {"encode": encode, "decode": decode}
        for direction, strategy in self._strategies.items():
            if direction not in strategy.directions:
                raise StrategyError(
                    f"strategy {strategy.name} for {direction}; it can {' and '.join(sorted(strategy.directions))}"
                    f" only; choose another strategy for {direction}"
                )
        loaded = next((p for p in autoencoder.parameters() if not p.is_meta), None)
        self._dtype: torch.dtype = dtype or (autoencoder.dtype if loaded is None else loaded.dtype)
        self._device = device or (torch.device("cpu") if loaded is None else loaded.device)
        self._weights = weights
        self._released = False
        self._vae: BoundVae | None = None
        self._runners: dict[Direction, Runner] = {}
        self._honoured: set[tuple[Direction, str, LatentShape]] = set()
        self._comm: Comm | None = None
        self._ledger = Ledger()

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
        """From a diffusers VAE folder. Each rank reads the weights that its part needs, when it needs them."""
        with torch.device("meta"):
            autoencoder = AutoencoderKLWan.from_config(AutoencoderKLWan.load_config(folder))
        weights = FolderWeights(Path(folder))
        return cls(autoencoder, encode, decode, group, weights=weights, dtype=dtype, device=torch.device(device))

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
        """What this rank has sent and received so far."""
        return self._ledger

    @property
    def comm(self) -> Comm:
        """The messages of its group. Made on first use, which is collective over the group."""
        if self._comm is None:
            self._comm = Comm(self._group, self._ledger)
        return self._comm

    def plan(self, direction: Direction, shape: LatentShape) -> StrategyPlan:
        """What each rank does for a clip of `shape`. Raises StrategyError for what the strategy cannot do."""
        program = self._bound().program(direction)
        return self._strategies[direction].plan(program, shape, self.comm.size)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Latents [B, z_dim, T, h, w] -> picture [B, 3, F, H, W] in [-1, 1], on every rank of the group."""
        self._agree("decode", z)
        strategy, comm = self._strategies["decode"], self.comm
        program = self._bound().program("decode")
        frames = program.picture_frames(z.shape[2])
        sizes = (z.shape[3] * program.spatial, z.shape[4] * program.spatial)
        shape = (z.shape[0], program.picture_channels, frames, *sizes)

        with comm.run():
            stream = self._runner("decode").stream(z, pixels="float")
            if strategy.everywhere:
                picture = z.new_empty(shape)
                _fill(picture, stream)
            else:
                whole = RootTensor(comm, shape, like=z)
                _fill(whole.tensor, stream)
                picture = whole.everywhere()
        return DecoderOutput(sample=picture) if return_dict else (picture,)

    def decode_stream(self, z: Tensor) -> Iterator[Tensor]:
        """Latents [1, z_dim, T, h, w] -> bytes [frames, H, W, 3], chunk by chunk as they are ready, on the root.

        A generator. The other ranks take part by iterating theirs, which yields nothing, to its end. Nothing
        happens before the first `next`. Closing the root's generator early ends the others' too; leaving it
        neither exhausted nor closed makes them wait. Memory does not grow with the number of frames.
        """
        self._agree("decode", z, one_clip=True)
        try:
            with self.comm.run():
                for chunk in self._runner("decode").stream(z, pixels="uint8"):
                    if self.comm.is_root:
                        yield chunk[0]
        except RunStopped:
            return

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

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode to the most likely latents and decode them."""
        (posterior,) = self.encode(sample, return_dict=False)
        return self.decode(posterior.mode(), return_dict=return_dict)

    def release(self, *directions: Direction) -> None:
        """Bind `directions` on this rank and drop every weight of the model that they do not need.

        Each rank then holds only its own share. Empties the `autoencoder` that this VAE was made from (its tensors
        move to the meta device), and fixes dtype and device. Raises StrategyError for a strategy whose
        ranks need other weights for other clips (`Strategy.depends_on_clip`).
        """
        for direction in directions:
            strategy = self._strategies[direction]
            if strategy.depends_on_clip:
                raise StrategyError(
                    f"release({direction!r}) with the strategy {strategy.name}; which weights a rank needs is "
                    "known when there is a clip; give the strategy that its settled(...) returns"
                )
            self._runner(direction)
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
            self._dtype, self._device = moved.dtype, moved.device
            self._vae = None
            self._runners.clear()
        super()._apply(lambda tensor: tensor if tensor.is_meta else fn(tensor), recurse)
        return self

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
        """Raise the same ValueError on every rank unless all of them can do, and are about to do, the same."""
        call = _Call(direction, tuple(tensor.shape), str(tensor.dtype), repr(self._strategies[direction]))
        calls = self.comm.agree((call, self._refusal(direction, tensor, one_clip=one_clip)))
        for rank, (_, refusal) in enumerate(calls):
            if refusal is not None:
                error = StrategyError if refusal.by_strategy else VaeInputError
                raise error(refusal.message if len(calls) == 1 else f"rank {rank}: {refusal.message}")
        for rank, (other, _) in enumerate(calls):
            if other != calls[0][0]:
                raise VaeInputError(
                    f"rank {rank} calls {other} and rank 0 {calls[0][0]}; the ranks of a group work on one clip; "
                    "give every rank the same tensor and strategy"
                )

    def _refusal(self, direction: Direction, tensor: Tensor, *, one_clip: bool) -> _Refusal | None:
        program = self._bound().program(direction)
        problem = problem_of(program, tensor, dtype=self._dtype, device=self._device, one_clip=one_clip)
        if problem is not None:
            return _Refusal(problem, by_strategy=False)
        strategy, shape = self._strategies[direction], latent_shape(program, tensor)
        # Making a plan takes milliseconds, which for a small clip is felt.
        honoured = (direction, repr(strategy), shape)
        if honoured not in self._honoured:
            try:
                strategy.plan(program, shape, self.comm.size)
            except StrategyError as error:
                return _Refusal(str(error), by_strategy=True)
            self._honoured.add(honoured)
        return None


def _fill(picture: Tensor | None, stream: Iterator[Tensor]) -> None:
    """Write the chunks of `stream` into `picture` [B, 3, F, H, W]; a rank to which none come has no picture."""
    at = 0
    for chunk in stream:
        assert picture is not None, "a strategy yields the picture on the root only"
        picture[:, :, at : at + chunk.shape[2]].copy_(chunk)
        at += chunk.shape[2]
