"""What passes one rank of a line, chunk by chunk. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cosmos3_pipeline.vae.ops import LatentShape, Shape
from cosmos3_pipeline.vae.program import Program


class Passing:
    """How the chunks of one clip, of `latent`, pass a rank that runs the ops `runs[chunk]` on each.

    An op that the rank below has run and this one runs on the next chunk is the first after this one's run until
    then: this rank has seen its input. So nothing is ever sent up the line.
    """

    def __init__(self, program: Program, latent: LatentShape, runs: Sequence[tuple[int, int]]) -> None:
        self.runs = runs
        self._program = program
        self._latent = latent

    def handed_over(self, index: int) -> list[int]:
        """Ops that keep frames, run by this rank on the chunk before, and by the one below on this."""
        return self._keeping(self.runs[index][1], self.runs[index - 1][1]) if index else []

    def taken_over(self, index: int) -> list[int]:
        """Ops that keep frames, run by the rank above on the chunk before, and by this one on this."""
        return self._keeping(self.runs[index][0], self.runs[index - 1][0]) if index else []

    def handed_back(self, index: int) -> list[int]:
        """Ops that keep frames, run by this rank on the chunk before, and by the one above on this."""
        return self._keeping(self.runs[index - 1][0], self.runs[index][0]) if index else []

    def keeps_passed(self, index: int) -> bool:
        """Whether this rank has to keep some of the input of the op after its run, to run it on a later chunk."""
        stop = self.runs[index][1]
        following = [stop for _, stop in self.runs[index + 1 : index + 2]]
        taken = [op for next_stop in following for op in self._keeping(stop, next_stop)]
        assert taken in ([], [stop]), f"what ops {taken} need has not been seen before op {stop}"
        if taken:
            seen = [stop for _, stop in self.runs[max(0, index + 1 - self._program.chunks_kept(stop)) : index + 1]]
            assert min(seen) >= stop, f"not all that op {stop} needs has been seen"
            return True
        # It may need what it sees of more chunks than one.
        most = max(other for _, other in self.runs)
        return bool(following) and stop < most and self._program.chunks_kept(stop) > 1

    def portions(self, index: int) -> int:
        """In how many portions a chunk comes."""
        return self._program.portions_at(self.runs[index][0], first=index == 0)

    def expected(self, index: int) -> Iterator[list[Shape]]:
        """The shapes of what comes from above for a chunk, portion by portion."""
        shapes = self._program.carried_shapes(self.runs[index][0], self._latent, first=index == 0)
        kept = [self._program.kept_shape(op, self._latent) for op in self.taken_over(index)]
        for _ in range(self.portions(index)):
            yield [*shapes, *kept]
            kept.clear()

    def leaving(self, index: int) -> Iterator[list[Shape]]:
        """The shapes of what it sends to the rank below for a chunk, portion by portion."""
        cut, first = self.runs[index][1], index == 0
        kept = [self._program.kept_shape(op, self._latent) for op in self.handed_over(index)]
        for _ in range(self._program.portions_at(cut, first=first)):
            yield [*self._program.carried_shapes(cut, self._latent, first=first), *kept]
            kept.clear()

    def _keeping(self, start: int, stop: int) -> list[int]:
        ops = self._program.keeping(start, stop)
        assert all(map(self._program.can_change_ranks, ops)), "such an op keeps more than its last frames"
        return ops
