"""The guidance passes of a step: which are computed, by which rank, and how their velocities become one.

A pass is one run of the tokens through the transformer. Imports no torch: a plan counts the passes by the same
lines by which a run decides. Source: `Cosmos3LoopDenoiser` and `Cosmos3TransferLoopDenoiser` in diffusers
`modular_pipelines/cosmos/denoise.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

COND, UNCOND = "cond", "uncond"
NO_CONTROL = f"{COND}_no_control"
WITH_CONTROLS = "_full"  # ends the name of a pass over control clips and the clip
Interval = tuple[float, ...]  # the lowest and the highest timestep, from 0 to 1000, both included


@dataclass(frozen=True)
class GuidancePass:
    """One pass. `name` is the prefix of its fields in diffusers.

    The velocity moves away from this pass's by `scale`: own + scale * (velocity - own). The first pass is where it
    begins, so its scale is not read. `interval` None: the pass is computed in every step.
    """

    name: str
    scale: float = 1.0
    interval: Interval | None = None

    @property
    def prompt(self) -> str:
        """Which prompt it reads: `COND` or `UNCOND`, with which its name begins."""
        return self.name.partition("_")[0]

    @property
    def controls(self) -> bool:
        """Whether control clips stand in front of its clip, where a run has some."""
        return self.name.endswith(WITH_CONTROLS)


@dataclass(frozen=True)
class Guidance:
    """The passes of a run in diffusers' order. They have numbers: their places in `passes`.

    The first one, of the prompt, is computed in every step.
    """

    passes: tuple[GuidancePass, ...]

    @classmethod
    def of_prompt(cls, scale: float, interval: Sequence[float] | None = None) -> Guidance:
        """A prompt and its negative prompt; at scale 1.0 the negative one cancels out, so it is no pass."""
        prompt = GuidancePass(COND)
        if scale == 1.0:
            return cls((prompt,))
        return cls((prompt, GuidancePass(UNCOND, scale, _between(interval))))

    @classmethod
    def of_controls(
        cls,
        scale: float,
        control_scale: float,
        interval: Sequence[float] | None = None,
        control_interval: Sequence[float] | None = None,
    ) -> Guidance:
        """A prompt and its negative prompt where control clips are followed.

        The controls are amplified between a pass with the prompt alone and one with both. At a control scale of
        1.0 the former is no pass, and the negative prompt is none at scales up to 1.0.
        """
        passes = [GuidancePass(f"{COND}{WITH_CONTROLS}")]
        if control_scale != 1.0:
            passes.append(GuidancePass(NO_CONTROL, control_scale, _between(control_interval)))
        if scale > 1.0:
            passes.append(GuidancePass(f"{UNCOND}{WITH_CONTROLS}", scale, _between(interval)))
        return cls(tuple(passes))

    def at(self, timestep: float) -> tuple[int, ...]:
        """The numbers of the passes that a step at `timestep` has."""
        return tuple(
            number
            for number, one in enumerate(self.passes)
            if one.interval is None or one.interval[0] <= timestep <= one.interval[1]
        )

    def shares(self, ranks: int) -> list[range]:
        """The passes of each of `ranks` on the `cfg` axis, the same in every step, so a rank keeps its texts only.

        In a step that has none of its passes a rank waits for the velocities of the others.
        """
        return shares_of(len(self.passes), ranks)

    def prompts(self, *, ranks: int, rank: int) -> list[str]:
        """The prompts that the passes of the rank at `rank` of the `cfg` axis read, each once."""
        return list(dict.fromkeys(self.passes[number].prompt for number in self.shares(ranks)[rank]))

    def combine(self, velocities: Mapping[int, Tensor]) -> Tensor:
        """The guided velocity in fp32, of a step that has the passes of `velocities`, by their numbers."""
        (_, first), *others = sorted(velocities.items())
        velocity = first.float()
        for number, other in others:
            own = other.float()
            velocity = (velocity - own).mul_(self.passes[number].scale).add_(own)
        return velocity


def _between(interval: Sequence[float] | None) -> Interval | None:
    return None if interval is None else tuple(interval)


def shares_of(passes: int, ranks: int) -> list[range]:
    """The numbers of `passes` passes that each of `ranks` computes: contiguous, the first ranks the odd ones."""
    edges = [-(-passes * rank // ranks) for rank in range(ranks + 1)]
    return [range(*edge) for edge in pairwise(edges)]


@dataclass
class PassCounts:
    """The passes of a run by their names, over all ranks: computed ones, and those that a cache has spared."""

    computed: Counter[str] = field(default_factory=Counter)
    cached: Counter[str] = field(default_factory=Counter)
