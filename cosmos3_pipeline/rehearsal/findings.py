"""The results of a rehearsal, and findings where they differ from the plan. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cosmos3_pipeline.config.schema import Placement
from cosmos3_pipeline.denoise.cost import Wire
from cosmos3_pipeline.planning.plan import Plan
from cosmos3_pipeline.planning.stage import RankStage
from cosmos3_pipeline.planning.units import quantity

# How far the peak memory of a stage may be above its plan, and below. The first is smaller, because a plan that is
# too low lets a run fail with out of memory.
MEMORY_TOLERANCE = 0.05
MEMORY_TOLERANCE_BELOW = 0.1
# How far the FLOPs of a stage may differ from the plan.
FLOPS_TOLERANCE = 0.01
# Unplanned copies from the host, such as the schedule's numbers, may take at most this share of the kernels'
# roofline time.
COPIES_SHARE = 0.2
# Kinds of kernels that the report sums up.
KINDS = ("convolution", "matmul and attention", "everything else")
# If a replica has at most this many ranks, all of them are rehearsed, so that their messages can be replayed.
REPLAYED_RANKS = 8
# Lines of diffusers on which the host is allowed to wait in every step: source text -> reason.
ALLOWED_WAITS = {
    **dict.fromkeys(
        (
            '(block_state.cond_vision_segment["num_noisy_vision_tokens"],), t.item(), device=device',
            '(block_state.cond_sound_segment["sound_len"],), t.item(), device=device',
        ),
        "diffusers reads the noise level of a step from its schedule",
    ),
    '(block_state.cond_action_segment["num_noisy_action_tokens"],), t.item(), device=device': (
        "diffusers reads the noise level of a step from its schedule, for actions once more"
    ),
    "block_state.vision_timesteps = torch.full((block_state.num_noisy_vision_tokens,), t.item(), device=device)": (
        "diffusers reads the noise level of a step from its schedule"
    ),
    "latents = torch.randn(shape, generator=generator, devi"
    "ce=rand_device, dtype=dtype, layout=layout).to(device)": (
        "the noise of a distilled step is drawn on the host, so that every rank has the same"
    ),
    **dict.fromkeys(
        (
            "if torch.isfinite(mean_gain) and mean_gain > 0:",
            "distance += float((numerator / denominator).detach().cpu())",
        ),
        "a cache spares passes by how far the latents have moved, which is a value of the device",
    ),
    **dict.fromkeys(
        (
            "sigma_t, sigma_s0 = "
            "self.sigmas[self.step_index + 1].to(device), self.sigmas[self.step_index].to(device)",
            "alpha_si, sigma_si = self._sigma_to_alpha_sigma_t(self.sigmas[si].to(device))",
            "sigma_t, sigma_s0 = "
            "self.sigmas[self.step_index].to(device), self.sigmas[self.step_index - 1].to(device)",
        ),
        "UniPC brings numbers of its schedule, which it keeps on the host, to the device in every step",
    ),
}


@dataclass(frozen=True)
class SourceLine:
    """A line of the source: its place, its text, and an amount, which is bytes or a count."""

    place: str
    text: str
    amount: int


@dataclass(frozen=True)
class KernelFound:
    """Kernels that one line launches: launches, bytes read and written, FLOPs, and seconds by the roofline."""

    name: str
    place: str
    text: str
    calls: int
    moved_bytes: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class StageFound:
    """One stage of one rank, as rehearsed.

    holders: the lines that have allocated most of the peak.
    waits: lines on which the host waits for the accelerator.
    repeated: lines on which the host waits in every step or chunk.
    left: lines whose allocations a step never frees on the accelerator.
    roofline_seconds: the least time of its kernels, one after the other.
    kinds: roofline seconds, calls, bytes and FLOPs for each kind of kernel.
    costliest: the kernels with the most roofline seconds.
    copied_bytes: bytes copied from the host to the accelerator.
    """

    peak_bytes: int
    holders: tuple[SourceLine, ...]
    sent_bytes: int
    sent_messages: int
    kernels: int
    moved_bytes: int
    flops: int
    roofline_seconds: float
    kinds: dict[str, dict[str, float]]
    costliest: tuple[KernelFound, ...]
    copied_bytes: int
    waits: tuple[SourceLine, ...]
    repeated: tuple[SourceLine, ...]
    left: tuple[SourceLine, ...]


@dataclass(frozen=True)
class RankFound:
    """One rank, as rehearsed.

    second_clip: the stages of the second clip; empty if there is none.
    left_bytes: bytes held after the last frame; the lines `left` have allocated most of them.
    pinned_bytes: the peak of the host's pinned memory.
    waits_between: lines outside of all stages on which the host waits.
    misplaced: lines on which an accelerator's op reads a tensor of the host.
    raised: the error that ended the rehearsal early.
    """

    rank: int
    stages: dict[str, StageFound]
    second_clip: dict[str, StageFound] = field(default_factory=dict)
    left_bytes: int = 0
    left: tuple[SourceLine, ...] = ()
    pinned_bytes: int = 0
    waits_between: tuple[SourceLine, ...] = ()
    misplaced: tuple[SourceLine, ...] = ()
    raised: str | None = None

    @property
    def clips(self) -> Iterator[tuple[str, dict[str, StageFound]]]:
        """(suffix for the stage's name, stages) of each clip."""
        yield "", self.stages
        if self.second_clip:
            yield ", second clip", self.second_clip


@dataclass(frozen=True)
class Finding:
    """Something that is wrong. `rank` and `stage` are None if several are concerned."""

    kind: str
    text: str
    rank: int | None = None
    stage: str | None = None

    def __str__(self) -> str:
        where = "" if self.rank is None else f"rank {self.rank}: "
        where += "" if self.stage is None else f"{self.stage}: "
        return f"{where}{self.text}"


@dataclass(frozen=True)
class Rehearsed:
    """A rehearsal: the rehearsed ranks, the plan that they are compared with, and the findings.

    `alike` says for each rehearsed rank which ranks of the topology it represents.
    """

    plan: Plan
    ranks: tuple[RankFound, ...]
    alike: dict[int, list[int]]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = field(default=())


def rehearsed_ranks(plan: Plan, ranks: Sequence[int] | None) -> dict[int, list[int]]:
    """The ranks to rehearse, each with the ranks that it represents.

    These are `ranks` if given. Otherwise they are all ranks of the first replica, each representing the same rank
    of the other replicas, if a replica has at most `REPLAYED_RANKS`. Otherwise they are one rank of each kind.
    """
    if ranks is not None:
        return {rank: [rank] for rank in ranks}
    size = sum(rank.dp == 0 for rank in plan.ranks)
    if size <= REPLAYED_RANKS:
        return {place: list(range(place, len(plan.ranks), size)) for place in range(size)}
    return ranks_of_a_kind(plan)


def ranks_of_a_kind(plan: Plan) -> dict[int, list[int]]:
    """Ranks with equal plans, by the first of them. The first rank of a replica writes, so it is its own kind."""
    size = sum(rank.dp == 0 for rank in plan.ranks)
    kinds: dict[str, list[int]] = {}
    for rank in plan.ranks:
        key = repr((rank.rank % size == 0, rank.weight_bytes, rank.host_bytes, rank.text_bytes, rank.stages))
        kinds.setdefault(key, []).append(rank.rank)
    return {ranks[0]: ranks for ranks in kinds.values()}


def findings_of(plan: Plan, ranks: Sequence[RankFound], faults: Sequence[str]) -> Iterator[Finding]:
    """All findings about `ranks`; `faults` describes what is wrong with their messages."""
    for found in ranks:
        if found.raised is not None:
            yield Finding("raised", f"ended early: {found.raised}", found.rank)
        for line in found.misplaced:
            text = f"a tensor of the host goes into an op of the accelerator ({line.place}: {line.text})"
            yield Finding("device", text, found.rank)
        for line in found.waits_between:
            times = f"{line.amount} time{'s' * (line.amount > 1)}"
            text = f"the host waits for the accelerator {times} outside of stages ({line.place}: {line.text})"
            yield Finding("wait", text, found.rank)
        if found.raised is None:
            yield from _left(found, plan.ranks[found.rank].stages)
            yield from _pinned(found, plan.ranks[found.rank].host_bytes)
        for clip, stages in found.clips:
            for name, stage in stages.items():
                for kind, text in _of_stage(found, plan, name, stage):
                    yield Finding(kind, text, found.rank, f"{name}{clip}")
    if not any(found.raised for found in ranks):
        yield from (Finding("messages", text) for text in faults)


def _of_stage(found: RankFound, plan: Plan, name: str, stage: StageFound) -> Iterator[tuple[str, str]]:
    """The findings about one stage of one clip: (kind, text)."""
    planned = plan.ranks[found.rank].stages[name]
    if found.raised is None:
        # The plan has the peak over all clips. In the first of two clips the peak may be lower, so only the last
        # clip is checked for too little.
        lasts = stage is found.second_clip.get(name, stage)
        yield from _held(stage, planned, at_least=1 - MEMORY_TOLERANCE_BELOW if lasts else 0)
        yield from _computed(stage, planned)
        yield from _sent(stage, _to_send(found, plan, name, stage))
        if name in ("denoise", "decode"):  # other stages copy words and pictures from the host
            yield from _copied(stage, plan, planned)
    for line in stage.left:
        bytes_left = quantity("bytes", line.amount)
        yield "memory", f"every step leaves {bytes_left} more on the accelerator ({line.place}: {line.text})"
    for line in stage.repeated:
        if line.text not in ALLOWED_WAITS:
            every = "step" if name == "denoise" else "chunk"
            yield "wait", f"the host waits for the accelerator in every {every} ({line.place}: {line.text})"


def _to_send(found: RankFound, plan: Plan, name: str, stage: StageFound) -> Wire:
    """The planned sends of a stage in one clip. A second clip needs no sends that were made ahead for it."""
    planned = plan.ranks[found.rank].stages[name]
    if not plan.weights.stays or stage is not found.second_clip.get(name):
        return planned.sent
    return planned.sent + planned.sent_ahead * -1


def _copied(stage: StageFound, plan: Plan, planned: RankStage) -> Iterator[tuple[str, str]]:
    """Copies from the host that take time and are not planned.

    Three kinds of copies are planned: streamed weights, prompts that waited on the host, and the noise of the
    steps of a distilled checkpoint.
    """
    rate = plan.accelerator.host_bytes_per_s
    streamed = plan.weights.placement is Placement.streamed
    wanted = planned.seconds.get("weights", 0.0) * rate if streamed else 0.0
    wanted += planned.text_bytes if plan.clips > 1 else 0
    wanted += planned.noise_bytes
    if stage.copied_bytes - wanted > COPIES_SHARE * stage.roofline_seconds * rate:
        copied = quantity("bytes", stage.copied_bytes)
        yield "host", f"copies {copied} from the host, {quantity('bytes', wanted)} are planned"


def _pinned(found: RankFound, planned: int) -> Iterator[Finding]:
    if found.pinned_bytes != planned:
        text = f"{found.pinned_bytes:,} bytes of the host's memory are pinned; {planned:,} are planned"
        yield Finding("host", text, found.rank)


def _left(found: RankFound, planned: Mapping[str, RankStage]) -> Iterator[Finding]:
    """Memory still held after the last frame, beyond the weights and the latents, which are small.

    A task without frames is not checked, because no stage's plan says what should be left.
    """
    decode = planned.get("decode")
    if decode is None:
        return
    left = found.left_bytes - decode.weight_bytes
    if left > MEMORY_TOLERANCE * decode.peak_bytes:
        held = ", ".join(f"{quantity('bytes', line.amount)} by {line.place}" for line in found.left)
        text = (
            f"{quantity('bytes', left)} beside the weights are still held after the last frame; "
            f"of all that is held {held}"
        )
        yield Finding("memory", text, found.rank, "decode")


def _held(stage: StageFound, planned: RankStage, *, at_least: float) -> Iterator[tuple[str, str]]:
    """A peak that is less than `at_least` times its plan, or more than MEMORY_TOLERANCE above it."""
    if not at_least <= stage.peak_bytes / planned.peak_bytes <= 1 + MEMORY_TOLERANCE:
        held = ", ".join(f"{quantity('bytes', line.amount)} by {line.place}" for line in stage.holders)
        yield (
            "memory",
            f"holds {quantity('bytes', stage.peak_bytes)} at most, {stage.peak_bytes / planned.peak_bytes:.2f} of "
            f"the {quantity('bytes', planned.peak_bytes)} that are planned; most of it {held}",
        )


def _computed(stage: StageFound, planned: RankStage) -> Iterator[tuple[str, str]]:
    """FLOPs that are not as planned."""
    if planned.flops and abs(stage.flops / planned.flops - 1) > FLOPS_TOLERANCE:
        most = "; ".join(f"{quantity('flops', k.flops)} by {k.name} at {k.place}" for k in stage.costliest[:2])
        yield (
            "flops",
            f"{quantity('flops', stage.flops)} of products, {stage.flops / planned.flops:.3f} of the "
            f"{quantity('flops', planned.flops)} that are planned; {most}",
        )


def _sent(stage: StageFound, planned: Wire) -> Iterator[tuple[str, str]]:
    """Bytes and messages that are not as planned."""
    if stage.sent_bytes != planned.bytes:
        yield "bytes", f"sends {stage.sent_bytes:,} bytes; {planned.bytes:,} are planned"
    if stage.sent_messages != planned.messages:
        yield "messages", f"sends {stage.sent_messages:,} messages; {planned.messages:,} are planned"
