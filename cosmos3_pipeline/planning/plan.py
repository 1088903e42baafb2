"""The plan of a composition: the work, memory, messages and estimated time of each rank and stage.

FLOPs, weight bytes and bytes on the wire are exact, except for the number of text tokens, which only the
tokenizer knows. Activation bytes and seconds are estimates, see docs/plan.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from cosmos3_pipeline.checkpoint.hub import components_for, local_folder
from cosmos3_pipeline.checkpoint.weights import Part
from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.config.schema import Config, Device, Placement, TaskName
from cosmos3_pipeline.config.tasks import controls_of, controls_planned
from cosmos3_pipeline.denoise.cost import Wire
from cosmos3_pipeline.planning.actions import action_of
from cosmos3_pipeline.planning.chunks import Chunks
from cosmos3_pipeline.planning.denoising import Denoising
from cosmos3_pipeline.planning.geometry import Clip, chunks_of, clip_of, encoded_of, replica_ranks, tokens_beside
from cosmos3_pipeline.planning.hardware import Accelerator, accelerator_of
from cosmos3_pipeline.planning.sampling import caches, passes_of_steps
from cosmos3_pipeline.planning.sound import sound_stage
from cosmos3_pipeline.planning.stage import RankStage
from cosmos3_pipeline.planning.text import text_tokens_of
from cosmos3_pipeline.planning.trained import outside, words_of_another
from cosmos3_pipeline.planning.transformer import FP32_BYTES, TransformerSize
from cosmos3_pipeline.planning.vae import ELEMENT_BYTES, VaePlan, directions, strategy_of, vae_plan
from cosmos3_pipeline.planning.weights import WeightsCost, WeightsPlan, choices
from cosmos3_pipeline.planning.writing import Writing, writing_of
from cosmos3_pipeline.vae.program import Direction
from cosmos3_pipeline.vae.strategy import Strategy

SCHEMA_VERSION = 1
STAGES = ("text", "encode", "denoise", "sound", "decode")
# The share of a device's memory that may be filled with resident layers. The driver takes some memory, and no
# plan is exact.
FILLED = 0.95
AXES = ("nodes", "ranks_per_node", "dp", "cfg", "cp", "ulysses")
DIRECTIONS: tuple[Direction, ...] = ("encode", "decode")


@dataclass(frozen=True)
class RankPlan:
    """One rank: its place on each mesh axis, its weights, and its stages by name.

    `cp` is its row and its column in the grid. `weight_bytes` are on the device at some time. `host_bytes` wait in
    the memory of an accelerator's host. `text_bytes` are the encoded prompts of one clip.
    """

    rank: int
    node: int
    dp: int
    spare: int
    cfg: int
    cp: tuple[int, int]
    ulysses: int
    weight_bytes: dict[str, int]
    host_bytes: int
    text_bytes: int
    stages: dict[str, RankStage]

    @property
    def peak_bytes(self) -> int:
        return max(stage.peak_bytes for stage in self.stages.values())


@dataclass(frozen=True)
class Plan:
    """The plan of a composition. It is made once, shown, saved, and sent to the ranks, which carry it out.

    exactness: of each stage, relative to the same run on one rank with every guidance pass in every step.
    vae: the directions that the task runs, each with its strategy.
    unused: the strategy of a direction that the task does not run. The VAE is built with both strategies.
    other_tokens: the number of control, sound and action tokens.
    passes: how often each guidance pass is computed in all `steps`, by name. A `cache` makes it an upper bound.
    writing: how a video file is written while the clip is decoded.
    chunks: the parts of a clip that are made one after the other. `clip` is one chunk.
    clips: how many clips one replica makes. The other numbers are of one clip, except those of the text stage.
    """

    model: str
    task: str
    clip: Clip
    other_tokens: dict[str, int]
    chunks: Chunks
    text_tokens: tuple[int, ...]
    steps: int
    passes: dict[str, int]
    cache: str
    clips: int
    topology: dict[str, Any]
    accelerator: Accelerator
    weights: WeightsPlan
    exactness: dict[str, str]
    strategies: dict[str, str]
    strategy_notes: dict[str, str]
    vae: dict[Direction, VaePlan]
    unused: dict[Direction, Strategy]
    ranks: tuple[RankPlan, ...]
    writing: Writing | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """The plan in a few lines, as at the head of a run's log."""
        from cosmos3_pipeline.planning.summary import summary_lines

        return "\n".join(summary_lines(self))

    @property
    def peak_bytes(self) -> int:
        return max(rank.peak_bytes for rank in self.ranks)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.accelerator.memory_bytes

    def slowest(self, stage: str) -> RankStage:
        """The named stage on its slowest rank, for which the other ranks wait."""
        return max((rank.stages[stage] for rank in self.ranks), key=lambda s: s.total_seconds)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each stage, and of `rest`: file and host work around the stages."""
        stages = {name: self.slowest(name).total_seconds for name in self.ranks[0].stages}
        return {**stages, "rest": self.accelerator.overhead_s}

    def sent(self, stage: str) -> Wire:
        """Bytes and messages that all ranks together send in a stage."""
        total = Wire()
        for rank in self.ranks:
            total += rank.stages[stage].sent
        return total


def make_plan(
    cfg: Config,
    *,
    vae: Mapping[Direction, VaePlan] | None = None,
    text_tokens: tuple[int, int] | None = None,
) -> Plan:
    """The plan of a checked config. Imports no torch.

    `vae` has the VAE's plans if a check has made them already. `text_tokens` are the lengths of the tokenized
    prompt and negative prompt; without them an estimate is used. The placement of the weights is chosen here, see
    `planning.weights`. Raises Refusal if a strategy cannot divide this clip.
    """
    clip = clip_of(cfg)
    denoising, *later = [
        Denoising.of(
            cfg,
            TransformerSize.of(plain(cfg.model.transformer), latent_channels=cfg.model.vae.z_dim),
            text_tokens=text_tokens or text_tokens_of(cfg),
            element_bytes=ELEMENT_BYTES[cfg.model.dtype],
            chunk=chunk,
        )
        for chunk in range(min(chunks_of(cfg).count, 2))  # later chunks are like the second
    ]
    if later:
        denoising = replace(denoising, later=later[0], chunks=chunks_of(cfg).count)
    if vae is None:
        vae = {direction: vae_plan(cfg, direction, strategy_of(cfg, direction)) for direction in directions(cfg)}
    stages = {str(direction): stage for direction, stage in vae.items()}
    weights, ranks = _placed(cfg, denoising, stages)
    exactness = {name: stage.plan.exactness.value for name, stage in stages.items()}
    exactness["text"] = exactness["denoise"] = "bitwise" if denoising.grid.ranks == 1 else "rounding"
    # On a CPU, PyTorch's order of summing a waveform depends on the number of threads.
    threads = cfg.topology.threads_per_rank if cfg.topology.device == Device.cpu else 1
    exactness["sound"] = exactness["denoise"] if threads == 1 else "rounding"
    if caches(cfg) or len(set(passes_of_steps(cfg))) > 1:
        exactness["denoise"] = exactness["sound"] = "approximate"
    decoded = max((rank.stages["decode"].total_seconds for rank in ranks if "decode" in stages), default=0)
    makes_video = cfg.task.modality != "image" and "decode" in stages
    return Plan(
        model=cfg.model.name,
        task=cfg.task.name.value,
        clip=clip,
        other_tokens=tokens_beside(cfg),
        chunks=chunks_of(cfg),
        text_tokens=denoising.text_tokens,
        steps=cfg.sampler.steps,
        passes=denoising.computed,
        cache=cfg.sampler.cache.name.value,
        clips=denoising.prompts,
        topology={axis: getattr(cfg.topology, axis) for axis in AXES},
        accelerator=accelerator_of(cfg),
        weights=weights,
        exactness={name: exactness[name] for name in STAGES if name in ranks[0].stages},
        strategies={name: stage.plan.strategy for name, stage in stages.items()},
        strategy_notes={name: stage.plan.note for name, stage in stages.items()},
        vae=dict(vae),
        unused={d: strategy_of(cfg, d) for d in DIRECTIONS if d not in vae},
        ranks=ranks,
        writing=writing_of(cfg, decoded) if makes_video else None,
        warnings=_warnings(cfg),
        notes=_notes(cfg, text_tokens is None),
    )


def _placed(
    cfg: Config, denoising: Denoising, stages: Mapping[str, VaePlan]
) -> tuple[WeightsPlan, tuple[RankPlan, ...]]:
    """The placement of the weights, and the ranks with it.

    `weights=auto` takes the fastest placement that fits. If none fits, it takes the one that needs least memory.
    """
    limit = accelerator_of(cfg).memory_bytes
    tried = [_as_many_layers(cfg, choice, denoising, stages) for choice in choices(cfg)]

    def order(one: tuple[WeightsPlan, tuple[RankPlan, ...]]) -> tuple[bool, float]:
        peak = max(rank.peak_bytes for rank in one[1])
        seconds = max(rank.stages["denoise"].total_seconds for rank in one[1])
        return peak > limit, peak if peak > limit else seconds

    weights, ranks = min(tried, key=order)
    if cfg.weights.placement is Placement.auto:
        weights = replace(weights, chosen=_reason(weights, len(tried), fits=not order((weights, ranks))[0]))
    return weights, ranks


def _reason(weights: WeightsPlan, tried: int, *, fits: bool) -> str:
    if not fits:
        return f"none of {tried} placements fits; this one needs least"
    return f"the fastest of {tried} placements that fits" if tried > 1 else "there is no other"


def _as_many_layers(
    cfg: Config, weights: WeightsPlan, denoising: Denoising, stages: Mapping[str, VaePlan]
) -> tuple[WeightsPlan, tuple[RankPlan, ...]]:
    """The placement `weights` and its ranks. `resident_layers` -1 becomes the number of layers that fit.

    With several prompts or chunks, the generation pathway stays on the device while the VAE decodes, if both fit.
    """
    limit, layers = accelerator_of(cfg).memory_bytes, denoising.size.num_hidden_layers

    def ranks(weights: WeightsPlan) -> tuple[RankPlan, ...]:
        count = cfg.topology.nodes * cfg.topology.ranks_per_node
        cost = WeightsCost.of(
            weights,
            denoising.size,
            modalities=denoising.modalities,
            ranks=replica_ranks(cfg.topology),
            element_bytes=denoising.element_bytes,
            on_cpu=cfg.topology.device == Device.cpu,
        )
        return tuple(_rank(cfg, rank, denoising, stages, weights, cost) for rank in range(count))

    if weights.resident_layers < 0:
        weights = replace(weights, resident_layers=0)
        peak = max(rank.stages["denoise"].peak_bytes for rank in ranks(weights))
        each = denoising.size.slabs(Part.VISION)[0].elements * denoising.element_bytes
        stay = int(min(max((limit * FILLED - peak) // each, 0), layers))
        weights = replace(weights, resident_layers=stay)
    if denoising.again:
        staying = replace(weights, stays=True)
        found = ranks(staying)
        if max(rank.peak_bytes for rank in found) <= limit:
            return staying, found
    return weights, ranks(weights)


def _rank(
    cfg: Config,
    rank: int,
    denoising: Denoising,
    stages: Mapping[str, VaePlan],
    weights: WeightsPlan,
    cost: WeightsCost,
) -> RankPlan:
    topology = cfg.topology
    dp, in_replica = divmod(rank, replica_ranks(topology))
    grid = denoising.grid
    spare, place = divmod(in_replica, topology.cfg * grid.ranks)
    cfg_rank, sequence_rank = divmod(place, grid.ranks)
    on_cpu = topology.device == Device.cpu
    shares = {name: stage.plan.shares[in_replica] for name, stage in stages.items()}
    vae = {name: share.held_bytes for name, share in shares.items()}
    text = denoising.text_bytes(place)
    waiting = denoising.waiting_bytes(place) if on_cpu else 0
    # The encoder stays after its stage. Decoder and transformer stay from the second clip or chunk on.
    encoder = vae.get("encode", 0)
    decoder = vae.get("decode", 0) if denoising.again else 0
    kept = cost.vision_bytes if weights.stays else cost.text_read if weights.keep_text else 0
    planned = {"text": denoising.text_stage(cfg, place, cost)}
    if "encode" in stages:
        before = max(text, waiting) if denoising.prompts == 1 or on_cpu else 0
        before = text if denoising.chunks > 1 else before
        planned["encode"] = _encoded(
            cfg, stages["encode"], in_replica, weights=encoder + decoder + kept, text=before
        )
    planned["denoise"] = denoising.stage(cfg, place, cost, vae=encoder + decoder, stays=weights.stays)
    before_sound = encoder + decoder + kept
    if cfg.task.sound:
        planned["sound"] = sound_stage(
            cfg,
            is_root=in_replica == 0,
            weights=before_sound,
            text=waiting,
            latents=denoising.latent_elements * FP32_BYTES,
        )
    if "decode" in stages:
        after = encoder + vae["decode"] + kept
        # Every rank holds the denoised latents throughout.
        latents = denoising.latent_elements * FP32_BYTES
        held = text if denoising.chunks > 1 else waiting
        planned["decode"] = _decoded(cfg, stages["decode"], in_replica, weights=after, text=held, latents=latents)
    return RankPlan(
        rank=rank,
        node=rank // topology.ranks_per_node,
        dp=dp,
        spare=spare,
        cfg=cfg_rank,
        cp=grid.place(sequence_rank),
        ulysses=sequence_rank % grid.ulysses,
        weight_bytes={
            "text": cost.text_bytes,
            "transformer": cost.vision_bytes - (cost.text_read if weights.keep_text else 0),
            "vae": sum(share.weight_bytes for share in shares.values()),
            **({"sound": planned["sound"].weight_bytes - before_sound} if cfg.task.sound else {}),
        },
        host_bytes=cost.host_bytes,
        text_bytes=text,
        stages=planned,
    )


def _encoded(cfg: Config, encode: VaePlan, rank: int, *, weights: int, text: int) -> RankStage:
    """The encode stage. Every chunk encodes its conditioning frames and its controls."""
    inputs = {"weights": weights, "text": text, "inputs": _condition_bytes(cfg)}
    chunks = chunks_of(cfg)
    planned = encode.stage(cfg, rank, **inputs).times(max(controls_planned(cfg.task), 1) * chunks.count)
    for beginning, count in zip(encode.beginnings, (1, chunks.count - 1), strict=True):
        if beginning is not None:
            planned = planned.then(beginning.stage(cfg, rank, **inputs).times(count))
    return planned


def _decoded(cfg: Config, decode: VaePlan, rank: int, *, weights: int, text: int, latents: int) -> RankStage:
    """The decode stage of all chunks. Rank 0 sends the other ranks the first frames of the next chunk.

    latents: bytes of the latents in fp32. Once the weights are loaded, they are also held in the VAE's dtype.
    """
    inputs = latents + latents // FP32_BYTES * ELEMENT_BYTES[cfg.model.vae_dtype]
    planned = decode.stage(cfg, rank, weights=weights, text=text, inputs=inputs, before=latents)
    chunks = chunks_of(cfg)
    if decode.for_the_next is None:
        return planned.times(chunks.count)
    value = 1 if chunks.passed == "uint8" else ELEMENT_BYTES[cfg.model.vae_dtype]
    seed = 3 * cfg.task.height * cfg.task.width * chunks.overlap * value
    before = decode.for_the_next.stage(cfg, rank, weights=weights, text=text, inputs=inputs + seed)
    if rank == 0 and len(decode.plan.shares) > 1:
        before = replace(before, sent=before.sent + Wire(seed, 1))
    return before.times(chunks.count - 1).then(planned)


def _condition_bytes(cfg: Config) -> int:
    """Bytes of the frames to encode, as read and as diffusers pads them to at least two frames.

    The frames of a task with actions are padded before they are on the device. Control clips are encoded one
    after the other, so one is counted.
    """
    clip = encoded_of(cfg)
    pixels = 3 * clip.height * clip.width
    if cfg.task.name is TaskName.transfer:
        dtypes = {cfg.model.dtype, cfg.model.vae_dtype}  # read in the first dtype, encoded in the second
        return clip.num_frames * pixels * sum(ELEMENT_BYTES[dtype] for dtype in dtypes)
    if action_of(cfg.task) is not None:
        return clip.num_frames * pixels * ELEMENT_BYTES[cfg.model.vae_dtype]
    read = 2 if cfg.task.name is TaskName.flf2v else clip.num_frames
    return (read + max(clip.num_frames, 2)) * pixels * ELEMENT_BYTES[cfg.model.vae_dtype]


def _warnings(cfg: Config) -> tuple[str, ...]:
    """Warnings: the clip is outside the model's training, or the prompt is not about the user's picture."""
    found = list(words_of_another(cfg))
    if cfg.model.trained.when_outside == "warn":
        found += outside(cfg)
    return tuple(f"{problem.what}: {problem.why}; {problem.works}" for problem in found)


def _notes(cfg: Config, estimated_text: bool) -> tuple[str, ...]:
    notes = []
    model = cfg.model
    components = components_for(sound=cfg.task.sound)
    if (
        model.path is not None
        and local_folder(model.path, model.commit or model.revision, components=components) is None
    ):
        notes.append(f"{model.path} is not in the hub's cache: planned with the numbers of model={model.name}")
    notes += [f"the adapter {one.path} is added to the weights, with weight {one.weight:g}" for one in model.lora]
    notes += [ESTIMATES[cfg.topology.device]]
    if caches(cfg):
        notes.append(
            f"sampler/cache={cfg.sampler.cache.name.value} makes denoising approximate: the latents decide which "
            "passes are spared, so its passes, work, bytes and seconds are the most that there can be"
        )
    chunks = chunks_of(cfg)
    if cfg.task.name is TaskName.transfer and not controls_of(cfg.task):
        notes.append("no control is given: planned with one")
    if cfg.task.num_frames is None:
        notes.append(f"task.num_frames=null: planned for {chunks.total} frames; a run has as many as its controls")
    if chunks.count > 1:
        notes.append(f"{chunks.total} frames in {chunks.count} chunks of {chunks.frames}")
    if estimated_text:
        notes.append("the number of text tokens is an estimate: about one for four bytes of the prompt")
    return tuple(notes)


ESTIMATES = {
    Device.cpu: "seconds are rough: the accelerator is a laptop core nobody measured",
    Device.cuda: "seconds are fitted to published times of Nano on H100 and H200, see docs/plan.md for the error",
}


def as_dict(plan: Plan) -> dict[str, Any]:
    """The values of plan.json. Later versions add keys and never rename them."""
    from cosmos3_pipeline.planning.summary import summary

    clip, peak = plan.clip, max(plan.ranks, key=lambda rank: rank.peak_bytes)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": plan.model,
        "task": plan.task,
        "clip": {
            "height": clip.height,
            "width": clip.width,
            "num_frames": plan.chunks.total,
            "chunks": plan.chunks.count,
            "chunk_frames": clip.num_frames,
            "latent_frames": clip.latent_frames,
            "latent_rows": clip.latent_rows,
            "latent_cols": clip.latent_cols,
            "vision_tokens": clip.vision_tokens,
            **{f"{name}_tokens": count for name, count in plan.other_tokens.items()},
            "text_tokens": list(plan.text_tokens),
        },
        "steps": plan.steps,
        "passes": plan.passes,
        "cache": plan.cache,
        "clips_of_a_replica": plan.clips,
        "topology": {**plan.topology, "groups": groups(plan)},
        "accelerator": plan.accelerator.as_dict(),
        "weights": plan.weights.as_dict(),
        "exactness": plan.exactness,
        "strategies": plan.strategies,
        "strategy_notes": plan.strategy_notes,
        "stages": {
            name: {
                "flops": sum(rank.stages[name].flops for rank in plan.ranks),
                "sent_bytes": plan.sent(name).bytes,
                "sent_messages": plan.sent(name).messages,
                "seconds": plan.seconds[name],
                "bound": plan.slowest(name).bound,
            }
            for name in plan.ranks[0].stages
        },
        "ranks": [_rank_dict(rank) for rank in plan.ranks],
        "memory": {
            "limit_bytes": int(plan.accelerator.memory_bytes),
            "peak_bytes": plan.peak_bytes,
            "peak_rank": peak.rank,
            "peak_stage": max(peak.stages, key=lambda name: peak.stages[name].peak_bytes),
            "fits": plan.fits,
        },
        "seconds": {**plan.seconds, "total": sum(plan.seconds.values())},
        "writing": None if plan.writing is None else plan.writing.as_dict(),
        "notes": [*plan.warnings, *plan.notes],
        "summary": summary(plan),
    }


def _rank_dict(rank: RankPlan) -> dict[str, Any]:
    plain = {key: value for key, value in asdict(rank).items() if key != "stages"}
    plain["cp"] = list(rank.cp)
    stages = {
        name: {
            **stage.share,
            "flops": stage.flops,
            "weight_bytes": stage.weight_bytes,
            "text_bytes": stage.text_bytes,
            "activation_bytes": stage.activation_bytes,
            "peak_bytes": stage.peak_bytes,
            "sent_bytes": stage.sent.bytes,
            "sent_messages": stage.sent.messages,
            "seconds": stage.seconds,
        }
        for name, stage in rank.stages.items()
    }
    return {**plain, "stages": stages}


def groups(plan: Plan) -> dict[str, list[list[int]]]:
    """The ranks of every group, for each mesh axis of more than one rank and for the VAE."""
    replicas = sorted({rank.dp for rank in plan.ranks})
    found = {"vae": [[rank.rank for rank in plan.ranks if rank.dp == dp] for dp in replicas]}
    for axis in ("cfg", "cp", "ulysses"):
        others = [a for a in ("dp", "spare", "cfg", "cp", "ulysses") if a != axis]
        members: dict[tuple[int, ...], list[int]] = {}
        for rank in plan.ranks:
            members.setdefault(tuple(getattr(rank, other) for other in others), []).append(rank.rank)
        if len(next(iter(members.values()))) > 1:
            found[axis] = list(members.values())
    return found
