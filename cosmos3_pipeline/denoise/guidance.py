"""The guidance passes of a step: which are computed, by which rank, and how their velocities are combined.

A pass is one run of the tokens through the transformer. A plan counts passes with the same code that decides in a
run, so this module imports no torch. Source: `Cosmos3LoopDenoiser` and `Cosmos3TransferLoopDenoiser` in diffusers
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
WITH_CONTROLS = "_full"  # suffix of the name of a pass over control clips and the clip
Interval = tuple[float, ...]  # the lowest and the highest timestep, from 0 to 1000, both included


@dataclass(frozen=True)
class GuidancePass:
    """One pass. `name` is the prefix of its fields in diffusers.

    This pass changes the combined velocity v to own + scale * (v - own), where `own` is the velocity of this pass.
    The first pass is the initial v, so its scale is not read. With `interval` None the pass is in every step.
    """

    name: str
    scale: float = 1.0
    interval: Interval | None = None

    @property
    def prompt(self) -> str:
        """The prompt that the pass reads, `COND` or `UNCOND`: the prefix of its name."""
        return self.name.partition("_")[0]

    @property
    def controls(self) -> bool:
        """Whether the pass reads the run's control clips. In a run without control clips no pass reads any."""
        return self.name.endswith(WITH_CONTROLS)


@dataclass(frozen=True)
class Guidance:
    """The passes of a run in diffusers' order. The number of a pass is its index in `passes`.

    Pass 0, of the prompt, is computed in every step.
    """

    passes: tuple[GuidancePass, ...]

    @classmethod
    def of_prompt(cls, scale: float, interval: Sequence[float] | None = None) -> Guidance:
        """Passes of the prompt and the negative prompt. At scale 1.0 the latter cancels out and is left out."""
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
        """Passes of a run that follows control clips.

        `control_scale` amplifies the difference between a pass without and a pass with controls. At 1.0 the pass
        without controls is left out. The pass of the negative prompt is left out if `scale` is 1.0 or less.
        """
        passes = [GuidancePass(f"{COND}{WITH_CONTROLS}")]
        if control_scale != 1.0:
            passes.append(GuidancePass(NO_CONTROL, control_scale, _between(control_interval)))
        if scale > 1.0:
            passes.append(GuidancePass(f"{UNCOND}{WITH_CONTROLS}", scale, _between(interval)))
        return cls(tuple(passes))

    def at(self, timestep: float) -> tuple[int, ...]:
        """The numbers of the passes in a step at `timestep`."""
        return tuple(
            number
            for number, one in enumerate(self.passes)
            if one.interval is None or one.interval[0] <= timestep <= one.interval[1]
        )

    def shares(self, ranks: int) -> list[range]:
        """The passes of each of `ranks` on the `cfg` axis, the same in every step: a rank keeps only their texts.

        If a step has none of a rank's passes, this rank only waits for the velocities of the other ranks.
        """
        return shares_of(len(self.passes), ranks)

    def prompts(self, *, ranks: int, rank: int) -> list[str]:
        """The prompts that rank `rank` of the `cfg` axis needs for its passes, without duplicates."""
        return list(dict.fromkeys(self.passes[number].prompt for number in self.shares(ranks)[rank]))

    def combine(self, velocities: Mapping[int, Tensor]) -> Tensor:
        """The guided velocity of one step in fp32; `velocities` has the velocity of each pass, by number."""
        (_, first), *others = sorted(velocities.items())
        velocity = first.float()
        for number, other in others:
            own = other.float()
            velocity = (velocity - own).mul_(self.passes[number].scale).add_(own)
        return velocity


def _between(interval: Sequence[float] | None) -> Interval | None:
    return None if interval is None else tuple(interval)


def shares_of(passes: int, ranks: int) -> list[range]:
    """Divide pass numbers 0 to `passes` - 1 over `ranks`: contiguous; the first ranks take the remainder."""
    edges = [-(-passes * rank // ranks) for rank in range(ranks + 1)]
    return [range(*edge) for edge in pairwise(edges)]


@dataclass
class PassCounts:
    """How many passes of each name a run has computed, and how many the cache has skipped, over all ranks."""

    computed: Counter[str] = field(default_factory=Counter)
    cached: Counter[str] = field(default_factory=Counter)
