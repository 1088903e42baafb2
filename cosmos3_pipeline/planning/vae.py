"""The encode and decode stages of a plan: each rank's share by the strategy, and its time."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.config.plugins import build_strategy
from cosmos3_pipeline.config.schema import Config, Device, Dtype, TaskName, VaeConfig
from cosmos3_pipeline.denoise.cost import Wire
from cosmos3_pipeline.planning.actions import action_of
from cosmos3_pipeline.planning.geometry import chunks_of, clean_frames, clip_of, encoded_of, replica_ranks
from cosmos3_pipeline.planning.hardware import vae_rates
from cosmos3_pipeline.planning.stage import RankStage
from cosmos3_pipeline.vae.of_diffusers import OfDiffusers
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.plugins import REFERENCE, discover
from cosmos3_pipeline.vae.program import Direction, Program, program_for
from cosmos3_pipeline.vae.rates import ClipSeconds, Rates
from cosmos3_pipeline.vae.strategy import Planned, Strategy, StrategyPlan

Stage = TypeVar("Stage", bound="VaeStage")

ELEMENT_BYTES = {Dtype.float32: 4, Dtype.bfloat16: 2}


@dataclass(frozen=True)
class VaeStage:
    """One direction of the VAE over the ranks of a clip.

    clocked: its seconds by the clock; None for an `OwnRunner`, which has no actions.
    """

    program: Program
    shape: LatentShape
    plan: StrategyPlan
    clocked: ClipSeconds | None

    @property
    def traffic_bytes(self) -> int:
        """Bytes that the ops read and write for the whole clip: the input and output of every op once."""
        first = sum(op.source.elements(self.shape, first=True) for op in self.program.ops)
        first += sum(op.target.elements(self.shape, first=True) for op in self.program.ops)
        later = self.program.chunks(self.shape) - 1
        if later:
            rest = sum(op.source.elements(self.shape, first=False) for op in self.program.ops)
            first += later * (rest + sum(op.target.elements(self.shape, first=False) for op in self.program.ops))
        return first * self.shape.element_bytes

    def bounds(self, rank: int, rates: Rates) -> dict[str, float]:
        """Estimated seconds of `rank` for each bound alone: compute, memory, link.

        The clock says when the clip ends. The longer bound of compute and memory has all of this time except for
        the messages, also the time in which the rank waits for others.
        """
        share = self.plan.shares[rank]
        part = share.flops / self.program.flops(self.shape)
        compute = share.flops / rates.flops_per_s
        memory = self.traffic_bytes * part / rates.memory_bytes_per_s
        if self.clocked is None:
            fill = self.plan.until_end / max(each.flops for each in self.plan.shares)
            link = rates.link(0, len(self.plan.shares) - 1)
            wire = share.sent_bytes / link.bytes_per_s + share.sent_messages * link.latency_s
            return {"compute": fill * compute, "memory": fill * memory, "link": wire}
        working = self.clocked.seconds - self.clocked.on_links
        return {
            "compute": working if compute >= memory else min(compute, working),
            "memory": working if memory > compute else min(memory, working),
            "link": self.clocked.on_links,
        }

    def stage(
        self, cfg: Config, rank: int, *, weights: int, text: int, inputs: int, before: int | None = None
    ) -> RankStage:
        """The stage on `rank`, which also holds bytes of `weights`, prompts (`text`) and `inputs`.

        `before` are the bytes that it holds instead of `inputs` while it loads the weights, if they differ.
        """
        share = self.plan.shares[rank]
        ops = self.program.ops[slice(*share.ops)]
        # While an op's weights are brought into the form of its kernels, they are in memory twice.
        loading = self.shape.element_bytes * max(op.weight_elements for op in ops)
        return RankStage(
            flops=share.flops,
            weight_bytes=weights,
            text_bytes=text,
            activation_bytes=max(
                share.activation_bytes + inputs, loading + (inputs if before is None else before)
            ),
            sent=Wire(share.sent_bytes, share.sent_messages),
            seconds=self.bounds(rank, vae_rates(cfg)),
            share={
                "ops": list(share.ops),
                "rows": list(share.rows),
                "cols": list(share.cols),
                # ops of each chunk; empty if every chunk runs all
                "runs": [list(run) for run in share.runs],
            },
        )


@dataclass(frozen=True)
class VaePlan(VaeStage):
    """One direction as a run executes it. `strategy` is what the ranks receive: the planned assignment.

    `for_the_next` is the decode stage of a chunk that another chunk follows. Rank 0 receives its frames in the
    form that the next chunk needs. `beginnings` are for transfer: the stages that encode the first frames of the
    first chunk and of a later chunk (None: no frames).
    """

    strategy: Strategy
    beginnings: tuple[VaeStage | None, VaeStage | None] = (None, None)
    for_the_next: VaeStage | None = None


def directions(cfg: Config) -> list[Direction]:
    """Encode if the task has conditioning frames (and they exist), and decode if it makes a clip."""
    if cfg.task.name is TaskName.transfer:
        return ["encode", "decode"]
    latent_frames = clip_of(cfg).latent_frames
    frames = clean_frames(cfg.task.condition_latent_frames, latent_frames)
    encodes = bool(frames) and min(frames) >= 0 and max(frames) < latent_frames
    action = action_of(cfg.task)
    decodes = action is None or action.shows
    found: list[Direction] = ["encode"] if encodes else []
    return [*found, "decode"] if decodes else found


def is_parallel(vae: VaeConfig, direction: Direction) -> bool:
    """The flag of `direction`."""
    return vae.parallel_encode if direction == "encode" else vae.parallel_decode


def settings_of(vae: VaeConfig, direction: Direction) -> dict[str, Any]:
    """The config node of `direction`: the class of its strategy, `_target_`, and the settings."""
    return vae.encode if direction == "encode" else vae.decode


def reference() -> Strategy:
    """The strategy that the others are compared with, and that runs a direction whose flag is off."""
    built = discover().strategies[REFERENCE]()
    assert isinstance(built, Strategy)
    return built


def strategy_of(cfg: Config, direction: Direction) -> Strategy:
    """The strategy of `direction`: the configured one if its flag is on, else the reference or diffusers' VAE."""
    if not is_parallel(cfg.vae, direction):
        return OfDiffusers() if cfg.vae.kernels == OfDiffusers.name else reference()
    built = build_strategy(settings_of(cfg.vae, direction))
    assert isinstance(built, Strategy)
    return built


def shape_of(cfg: Config, direction: Direction) -> LatentShape:
    """The latent that is decoded or encoded. Encoding ends with the last conditioned latent frame."""
    clip = encoded_of(cfg) if direction == "encode" else clip_of(cfg)
    return LatentShape(
        *(1, clip.latent_frames, clip.latent_rows, clip.latent_cols, ELEMENT_BYTES[cfg.model.vae_dtype]),
        on_host=cfg.topology.device == Device.cpu,
    )


def vae_plan(cfg: Config, direction: Direction, strategy: Strategy) -> VaePlan:
    """The plan of `strategy` for the clip of `cfg`.

    Raises Refusal if the strategy cannot divide this clip, or if no VAE can have the numbers of `cfg`.
    """
    shape, ranks, rates = shape_of(cfg, direction), replica_ranks(cfg.topology), vae_rates(cfg)
    key = repr((direction, plain(cfg.model.vae), shape, ranks, rates, type(strategy), strategy))

    def planned() -> VaePlan:
        program = program_for(direction, plain(cfg.model.vae))
        stage = _stage(program, shape, strategy.plan(program, shape, ranks), rates)
        plan, given = stage.plan, strategy
        if plan.assignment is not None and type(strategy).runner is Strategy.runner:
            given = Planned(plan.assignment, shape, strategy.name)
        return VaePlan(program, shape, plan, stage.clocked, given)

    return _in_chunks(cfg, direction, _made_once(key, planned), key)


def _stage(program: Program, shape: LatentShape, plan: StrategyPlan, rates: Rates) -> VaeStage:
    """The stage of `plan`, which needs its lowered clip no longer."""
    clocked = None if plan.clip is None else rates.of_clip(plan.clip)
    return VaeStage(program, shape, replace(plan, clip=None), clocked)


def _in_chunks(cfg: Config, direction: Direction, planned: VaePlan, key: str) -> VaePlan:
    """`planned`, which is kept under `key`, with the further stages that a clip in chunks needs."""
    shape, chunks = planned.shape, chunks_of(cfg)

    def another(**changes: Any) -> VaeStage:
        other = replace(shape, **changes)

        def stage() -> VaeStage:
            plan = planned.strategy.plan(planned.program, other, len(planned.plan.shares))
            return _stage(planned.program, other, plan, vae_rates(cfg))

        return _made_once(f"{other} {key}", stage)

    if direction == "decode":
        if chunks.count == 1 or not chunks.overlap:
            return planned
        as_floats = chunks.passed == "float"
        return replace(planned, for_the_next=another(picture_bytes=shape.element_bytes) if as_floats else planned)
    if cfg.task.name is not TaskName.transfer:
        return planned
    lengths = [chunks.clean_latents(number, clip_of(cfg).temporal) for number in (0, 1)]
    first, later = (another(frames=frames) if frames else None for frames in lengths)
    return replace(planned, beginnings=(first, later if chunks.count > 1 else None))


def _made_once(key: str, make: Callable[[], Stage]) -> Stage:
    if key not in made:
        if len(made) >= MOST_MADE:
            made.clear()
        made[key] = make()
    return cast(Stage, made[key])


# Stages by everything that they depend on. The jobs of a sweep and the cases of a review share many of them. A
# review puts a mapping here that keeps them for later reviews.
MOST_MADE = 64
made: MutableMapping[str, VaeStage] = {}
