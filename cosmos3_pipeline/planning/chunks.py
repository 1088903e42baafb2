"""A clip that is made chunk after chunk: each begins with the frames that the one before has ended with.

Sources: for transfer diffusers `Cosmos3TransferSetupStep` and `Cosmos3TransferChunkVaeEncoderStep`, for forward
dynamics `run_rollout` in NVIDIA/cosmos `cookbooks/cosmos3/generator/action/run_fd_with_diffusers.ipynb`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Chunks:
    """`total` frames in chunks of `frames` (4k + 1), of which a later one repeats the `overlap` frames before it.

    `given` are the frames of an input clip with which the first chunk begins. Those with which a later one begins
    are `passed` to it as the decoder made them, or as pictures of 8 bits.
    """

    total: int
    frames: int
    overlap: int
    given: int
    passed: Literal["float", "uint8"] = "float"

    @classmethod
    def of(cls, total: int, *, at_most: int, overlap: int, given: int, temporal: int) -> Chunks:
        """`total` frames in chunks of `at_most` frames and those that `temporal` adds to end a latent frame."""
        frames = -(-(min(total, at_most) - 1) // temporal) * temporal + 1
        return cls(total, frames, overlap, given)

    @property
    def stride(self) -> int:
        """Frames from the first of a chunk to the first of the next one."""
        return self.frames - self.overlap

    @property
    def count(self) -> int:
        missing = max(self.total - self.frames, 0)
        return 1 + -(-missing // self.stride)

    def shown(self, number: int) -> range:
        """The frames of the control clips that chunk `number` has to follow."""
        start = number * self.stride
        return range(start, min(start + self.frames, self.total))

    def mirrored(self, number: int) -> list[int]:
        """Those frames, counted from the first of them, for each frame of the chunk.

        The last chunk may reach beyond the clip. There the controls go back and forth, as diffusers lets them go.
        """
        found = list(range(len(self.shown(number))))
        while len(found) < self.frames:
            missing = self.frames - len(found)
            back = found[::-1][: min(len(found) - 1, missing)]
            found += back or found[-1:] * missing
        return found

    def clean(self, number: int) -> int:
        """The frames with which chunk `number` begins and which it does not make."""
        return min(self.overlap if number else self.given, self.frames)

    def clean_latents(self, number: int, temporal: int) -> int:
        """Latent frames, of `temporal` frames each but the first, that begin with a clean frame."""
        clean = self.clean(number)
        return (clean - 1) // temporal + 1 if clean else 0

    def written(self, number: int) -> range:
        """Which frames of chunk `number` are new, and within the clip."""
        begin = self.overlap if number else 0
        return range(begin, len(self.shown(number)))
