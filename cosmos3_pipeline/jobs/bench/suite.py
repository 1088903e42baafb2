"""The cases of `job=bench` as a composition means them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

from cosmos3_pipeline.config.compose import compose
from cosmos3_pipeline.config.plain import plain
from cosmos3_pipeline.config.schema import Config, Dtype
from cosmos3_pipeline.plan.vae import ELEMENT_BYTES
from cosmos3_pipeline.vae.ops import LatentShape
from cosmos3_pipeline.vae.plugins import discover
from cosmos3_pipeline.vae.program import Direction
from cosmos3_pipeline.vae.strategy import Strategy

DIFFUSERS, TILED, DISTVAE, ROOFLINE = "diffusers", "diffusers_tiled", "distvae", "roofline"
ONE_RANK, ONE_RANK_EACH = "one_rank", "one_rank_each"
BUILT_IN = (DIFFUSERS, TILED, ONE_RANK, ONE_RANK_EACH, DISTVAE, ROOFLINE)
ALONE = (DIFFUSERS, TILED, ONE_RANK, ROOFLINE)  # these work on the root while the other ranks wait
CALLS = ("decode", "stream", "encode", "condition")
MEASURES = ("speed", "memory", "planned_memory", "own_weights", "distance")
RATIOS = ("speed", "memory", "distance")  # of one contestant to another
# The options of conf/model with the widths of the same name.
MODELS = {"small": "toy", "full": "nano"}


@dataclass(frozen=True)
class Target:
    """What is asked of a contestant; see conf/bench/targets.yaml."""

    measure: str
    of: str
    over: str | None
    over_case: str | None
    at_least: float | None
    at_most: float | None

    def __str__(self) -> str:
        bounds = [f"at least {self.at_least:g}"] if self.at_least is not None else []
        bounds += [f"at most {self.at_most:g}"] if self.at_most is not None else []
        bound, over = " and ".join(bounds), f"{self.over} in {self.over_case}" if self.over_case else self.over
        return {
            "speed": f"{self.of}: {bound} times as fast as {over}",
            "memory": f"{self.of}: {bound} of the memory of {over}",
            "planned_memory": f"{self.of}: {bound} of the memory of its plan",
            "own_weights": f"{self.of}: {bound} of the weights of its own ops",
            "distance": f"{self.of}: {bound} of the distance of {over} to float32",
        }[self.measure]


@dataclass(frozen=True)
class Case:
    """Contestants that do the same work on latents of `shape`, in `dtype` (a name of torch)."""

    name: str
    call: str
    shape: LatentShape
    dtype: str
    timed: bool
    ranks: int | None
    contestants: tuple[str, ...]
    targets: tuple[Target, ...]

    @property
    def direction(self) -> Direction:
        return "decode" if self.call in ("decode", "stream") else "encode"

    @property
    def worked(self) -> LatentShape:
        """The latents that ours really computes: of an image-to-video condition the first frame only."""
        if self.call != "condition":
            return self.shape
        return LatentShape(1, 1, self.shape.rows, self.shape.cols, self.shape.element_bytes)

    @property
    def simulated(self) -> bool:
        """Whether it times strategies of ours in what the seconds of ops are measured for."""
        ours = any(name not in BUILT_IN for name in self.contestants)
        return self.timed and self.call == "decode" and self.dtype == "float32" and ours

    @property
    def title(self) -> str:
        """For a person: what is done, on what."""
        s = self.shape
        frames = f"{s.frames} latent frame{'s' * (s.frames > 1)}"
        return f"{self.name}: {self.call}, {frames} of {s.rows} x {s.cols}, {self.dtype}"


def cases_of(bench: Mapping[str, Any]) -> list[Case]:
    """The chosen cases, in the order of the suite, of the plain values of the node `bench`."""
    chosen = bench["cases"]
    return [_case(one, bench) for one in bench["suite"] if chosen is None or one["name"] in chosen]


def _case(one: Mapping[str, Any], bench: Mapping[str, Any]) -> Case:
    rows, cols = one["full" if bench["width"] == "full" else "small"]
    dtype = bench["dtype"] or one["dtype"]
    shape = LatentShape(
        1,
        bench["frames"] or one["frames"],
        bench["rows"] or rows,
        bench["cols"] or cols,
        ELEMENT_BYTES[Dtype(dtype)],
    )
    case = Case(
        name=one["name"],
        call=one["call"],
        shape=shape,
        dtype=dtype,
        timed=one["timed"],
        ranks=one["ranks"],
        contestants=tuple(one["contestants"]),
        targets=tuple(Target(**target) for target in one["targets"]),
    )
    known = discover().strategies
    further = [
        name
        for name in bench["strategies"] or ()
        if name not in case.contestants and case.direction in known[name].directions  # type: ignore[attr-defined]
    ]
    return replace(case, contestants=(*case.contestants, *further))


def vae_dimensions(cfg: Config) -> dict[str, Any]:
    """The values of `AutoencoderKLWan` that `bench.width` names, as diffusers names them."""
    if cfg.bench.width == "model":
        return plain(cfg.model.vae)
    return plain(compose([f"model={MODELS[cfg.bench.width]}"]).typed().model.vae)


def build(name: str, cfg: Mapping[str, Any], direction: Direction, *, op_seconds: str = "") -> Strategy:
    """The strategy `name`, with its settings in `cfg` where it is the one configured there, else with its own.

    `cfg`: the plain values of the config.

    `op_seconds`: a file of what ops take here, for one that can divide by them and is told of no other.
    """
    cls = discover().strategies[name]
    settings = dict(cfg["vae"][direction])
    target = settings.pop("_target_")
    built = cls(**settings) if target == discover().target(name) else cls()
    assert isinstance(built, Strategy)
    if op_seconds and getattr(built, "op_seconds", None) == "":
        assert is_dataclass(built)
        built = replace(built, op_seconds=op_seconds)
    return built
