"""One rank's turns: take over what each convolution remembers, run it on the next chunk, hand it on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cosmos3_pipeline.distributed.comm import Comm, Pending
from cosmos3_pipeline.vae.executor import Slice, SliceState
from cosmos3_pipeline.vae.inputs import latent_shape
from cosmos3_pipeline.vae.pixels import as_pixels, latent_chunk, picture_chunk
from cosmos3_pipeline.vae.strategy import Direction, LatentShape, Pixels
from cosmos3_pipeline.vae.weights import BoundVae
from cosmos3_wavefront import remembered_shape


class Turns:
    """All ops of the program, in `parts`. Chunk k is for rank k modulo the ranks; the next rank follows."""

    def __init__(
        self, vae: BoundVae, comm: Comm, direction: Direction, parts: tuple[tuple[int, int], ...]
    ) -> None:
        self._comm = comm
        self._vae = vae
        self._program = vae.program(direction)
        self._slices = [vae.slice(direction, *part) for part in parts]
        self._before = (comm.rank - 1) % comm.size
        self._after = (comm.rank + 1) % comm.size

    def stream(self, z: Tensor, *, pixels: Pixels) -> Iterator[Tensor]:
        """Yields every chunk of the picture on the root, in order; the other ranks send theirs."""
        due = 0  # the next chunk that the root yields
        leaving: Pending | None = None
        for index, picture in self._outputs(z, lambda index: latent_chunk(z, index)):
            chunk = as_pixels(picture, pixels)
            if self._comm.is_root:
                # The chunks between are the others', and done: this one could only follow on them.
                for other in range(due, index):
                    yield self._receive_chunk(z, other, pixels)
                yield chunk
                due = index + 1
            else:
                # One picture may be under way while the next is computed; more would pile up in memory.
                if leaving is not None:
                    leaving.wait()
                leaving = self._comm.exchange(sends=[(chunk, 0)])
        if leaving is not None:
            leaving.wait()
        if self._comm.is_root:
            for other in range(due, z.shape[2]):
                yield self._receive_chunk(z, other, pixels)

    def encode(self, x: Tensor) -> Tensor:
        """[B, 3, F, H, W] -> moments [B, 2 * z_dim, T, h, w]: each rank broadcasts those of its chunks."""
        latent = latent_shape(self._program, x)
        own = dict(self._outputs(x, lambda index: picture_chunk(x, index)))
        moments = []
        for index in range(self._program.chunks(latent)):
            shape = self._program.ops[-1].target.shape(latent, first=index == 0)
            part = own[index] if index in own else x.new_empty(shape)
            self._comm.broadcast(part, source=index % self._comm.size)
            moments.append(part)
        return torch.cat(moments, dim=1).permute(0, 4, 1, 2, 3).contiguous()

    def _outputs(self, given: Tensor, chunk: Callable[[int], Tensor]) -> Iterator[tuple[int, Tensor]]:
        """This rank's chunks, each with its index."""
        latent = latent_shape(self._program, given)
        chunks, alone = self._program.chunks(latent), self._comm.size == 1
        states = [part.state(chunks) for part in self._slices]
        for index in range(self._comm.rank, chunks, self._comm.size):
            tensors = [chunk(index)]
            leaving = []
            for place, part in enumerate(self._slices):
                if index and not alone:
                    states[place] = self._take_over(part, latent, index, chunks)
                tensors = part.run(tensors, states[place])
                if index + 1 < chunks and not alone:
                    leaving.append(self._hand_on(part, latent, index, states[place]))
            # The next rank follows one message behind, so this is short, and bounds what is held.
            for pending in leaving:
                pending.wait()
            yield index, tensors[0]

    def _take_over(self, part: Slice, latent: LatentShape, index: int, chunks: int) -> SliceState:
        """What the ops of `part` remember of the chunk before `index`."""
        cache = {
            name: torch.empty(shape, dtype=self._vae.dtype, device=self._vae.device)
            for name, shape in self._remembered(part, latent, index - 1)
        }
        self._comm.exchange(receives=[(frames, self._before) for frames in cache.values()]).wait()
        return SliceState(chunks, done=index, cache=cache)

    def _hand_on(self, part: Slice, latent: LatentShape, index: int, state: SliceState) -> Pending:
        """Start sending what the ops of `part` remember of chunk `index`; nothing here writes to it any more."""
        names = [name for name, _ in self._remembered(part, latent, index)]
        return self._comm.exchange(sends=[(state.cache[name], self._after) for name in names])

    def _remembered(self, part: Slice, latent: LatentShape, index: int) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of what the ops of `part` remember after chunk `index`."""
        ops = self._program.ops[part.start : part.stop]
        shapes = ((op.name, remembered_shape(op, latent, first=index == 0)) for op in ops)
        return [(name, shape) for name, shape in shapes if shape is not None]

    def _receive_chunk(self, z: Tensor, index: int, pixels: Pixels) -> Tensor:
        """Chunk `index` of the picture, from the rank whose it was."""
        spec = self._program.ops[-1].target
        b, t, h, w, c = spec.shape(latent_shape(self._program, z), first=index == 0)
        chunk = (
            z.new_empty((b, t, h, w, c), dtype=torch.uint8) if pixels == "uint8" else z.new_empty((b, c, t, h, w))
        )
        self._comm.exchange(receives=[(chunk, index % self._comm.size)]).wait()
        return chunk
