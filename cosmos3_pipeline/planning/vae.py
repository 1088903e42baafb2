"""The encode and decode stages of a plan: each rank's share by the strategy, and its time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.config.plugins import build_strategy
from cosmos3_pipeline.config.schema import Config, Device, Dtype, TaskName, VaeConfig
from cosmos3_pipeline.denoise.cost import Wire
from cosmos3_pipeline.planning.actions import action_of
from cosmos3_pipeline.planning.geometry import chunks_of, clean_frames, clip_of, encoded_of, replica_ranks
from cosmos3_pipeline.planning.hardware import Accelerator, accelerator_of
from cosmos3_pipeline.planning.stage import RankStage
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.plugins import REFERENCE, discover
from cosmos3_pipeline.vae.program import Direction, Program, program_for
from cosmos3_pipeline.vae.strategy import Planned, Strategy, StrategyPlan

ELEMENT_BYTES = {Dtype.float32: 4, Dtype.bfloat16: 2}


@dataclass(frozen=True)
class VaeStage:
    """One direction of the VAE over the ranks of a clip."""

    program: Program
    shape: LatentShape
    plan: StrategyPlan

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

    @property
    def fill(self) -> float:
        """Critical path divided by the busiest rank's FLOPs. It is above 1 if ranks wait."""
        return self.plan.until_end / max(share.flops for share in self.plan.shares)

    def bounds(
        self, rank: int, accelerator: Accelerator, dtype: Dtype, *, crosses_nodes: bool
    ) -> dict[str, float]:
        """Estimated seconds of `rank` for each bound alone: compute, memory, link."""
        share = self.plan.shares[rank]
        rate = accelerator.flops_per_s[dtype] * accelerator.efficiency["vae"]
        part = share.flops / self.program.flops(self.shape)
        return {
            "compute": self.fill * share.flops / rate,
            "memory": self.fill * self.traffic_bytes * part / accelerator.memory_bytes_per_s,
            "link": accelerator.wire_seconds(share.sent_bytes, share.sent_messages, crosses_nodes=crosses_nodes),
        }

    def stage(self, cfg: Config, rank: int, *, weights: int, text: int, inputs: int) -> RankStage:
        """The stage on `rank`, which also holds bytes of `weights`, prompts (`text`) and `inputs`."""
        share = self.plan.shares[rank]
        crosses = len(self.plan.shares) > cfg.topology.ranks_per_node
        return RankStage(
            flops=share.flops,
            weight_bytes=weights,
            text_bytes=text,
            activation_bytes=share.activation_bytes + inputs,
            sent=Wire(share.sent_bytes, share.sent_messages),
            seconds=self.bounds(rank, accelerator_of(cfg), cfg.model.vae_dtype, crosses_nodes=crosses),
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
    """The strategy of `direction`: the configured one if its flag is on, else the reference."""
    if not is_parallel(cfg.vae, direction):
        return reference()
    built = build_strategy(settings_of(cfg.vae, direction))
    assert isinstance(built, Strategy)
    return built


def vae_plan(cfg: Config, direction: Direction, strategy: Strategy) -> VaePlan:
    """The plan of `strategy` for the clip of `cfg`. Encoding ends with the last conditioned latent frame.

    Raises Refusal if the strategy cannot divide this clip, or if no VAE can have the numbers of `cfg`.
    """
    clip = encoded_of(cfg) if direction == "encode" else clip_of(cfg)
    shape = LatentShape(
        *(1, clip.latent_frames, clip.latent_rows, clip.latent_cols, ELEMENT_BYTES[cfg.model.vae_dtype]),
        on_host=cfg.topology.device == Device.cpu,
    )
    ranks = replica_ranks(cfg.topology)
    key = repr((direction, plain(cfg.model.vae), shape, ranks, type(strategy), strategy))
    if key not in _made:
        program = program_for(direction, plain(cfg.model.vae))
        plan = strategy.plan(program, shape, ranks)
        given = strategy
        if plan.assignment is not None and type(strategy).runner is Strategy.runner:
            given = Planned(plan.assignment, shape, strategy.name)
        if len(_made) == MOST_MADE:
            _made.clear()
        _made[key] = VaePlan(program, shape, plan, given)
    planned = _made[key]
    return _in_chunks(cfg, direction, planned)


def _in_chunks(cfg: Config, direction: Direction, planned: VaePlan) -> VaePlan:
    """`planned`, with the further stages that a clip in chunks needs."""
    shape, chunks = planned.shape, chunks_of(cfg)

    def another(**changes: Any) -> VaeStage:
        other = replace(shape, **changes)
        ranks = len(planned.plan.shares)
        return VaeStage(planned.program, other, planned.strategy.plan(planned.program, other, ranks))

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


# Plans by everything that they depend on. The jobs of a sweep and the cases of a review share many plans.
MOST_MADE = 64
_made: dict[str, VaePlan] = {}
