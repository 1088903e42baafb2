"""Cuts that move as they like, within what `layer_pipeline` allows."""

from __future__ import annotations

import random

from cosmos3_pipeline.vae.program import Program


def wandering(program: Program, zone: tuple[int, int], chunks: int, seed: int) -> list[int]:
    """The ops of `zone` [start, stop) before which a cut lies, chunk by chunk."""
    start, stop = zone
    chance = random.Random(seed)
    path: list[int] = []
    for _ in range(chunks):
        cuts = [cut for cut in range(start, stop) if _may_move(program, path, cut)]
        # There are more ways back than on.
        on = [cut for cut in cuts if path and program.keeping(path[-1], cut)]
        path.append(chance.choice(on if on and chance.random() < 0.7 else cuts))
    return path


def _may_move(program: Program, path: list[int], cut: int) -> bool:
    if not path:
        return True
    at = path[-1]
    over = range(min(at, cut), max(at, cut))
    if not all(map(program.can_change_ranks, over)):
        return False
    kept = program.keeping(at, cut)
    return not kept or (kept == [at] and min(path[-program.chunks_kept(at) :]) >= at)
