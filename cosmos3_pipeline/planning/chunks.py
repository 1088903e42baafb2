"""A clip that is generated chunk after chunk. Each chunk begins with the last frames of the chunk before it.

Sources: for transfer diffusers `Cosmos3TransferSetupStep` and `Cosmos3TransferChunkVaeEncoderStep`, for forward
dynamics `run_rollout` in NVIDIA/cosmos `cookbooks/cosmos3/generator/action/run_fd_with_diffusers.ipynb`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Chunks:
    """`total` frames in chunks of `frames` (4k + 1). A later chunk repeats the `overlap` frames before it.

    The first chunk begins with `given` frames of an input clip. `passed` says in which form a later chunk receives
    the repeated frames: `float` as the decoder made them, or `uint8` as 8-bit pictures.
    """

    total: int
    frames: int
    overlap: int
    given: int
    passed: Literal["float", "uint8"] = "float"

    @classmethod
    def of(cls, total: int, *, at_most: int, overlap: int, given: int, temporal: int) -> Chunks:
        """Chunks of `at_most` frames, or of `total` if that is less, rounded up to whole latent frames."""
        frames = -(-(min(total, at_most) - 1) // temporal) * temporal + 1
        return cls(total, frames, overlap, given)

    @property
    def stride(self) -> int:
        """Frames from the start of a chunk to the start of the next chunk."""
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
        """For each frame of chunk `number`, the index of its control frame in `shown(number)`.

        The last chunk may reach beyond the clip. There the control frames are mirrored, as in diffusers.
        """
        found = list(range(len(self.shown(number))))
        while len(found) < self.frames:
            missing = self.frames - len(found)
            back = found[::-1][: min(len(found) - 1, missing)]
            found += back or found[-1:] * missing
        return found

    def clean(self, number: int) -> int:
        """How many frames at the start of chunk `number` are taken over, not generated."""
        return min(self.overlap if number else self.given, self.frames)

    def clean_latents(self, number: int, temporal: int) -> int:
        """How many latent frames begin with a clean frame.

        The first latent frame is one frame, each later one is `temporal` frames.
        """
        clean = self.clean(number)
        return (clean - 1) // temporal + 1 if clean else 0

    def written(self, number: int) -> range:
        """The frames of chunk `number` that are new and within the clip."""
        begin = self.overlap if number else 0
        return range(begin, len(self.shown(number)))
