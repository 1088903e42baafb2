"""A plan in few numbers: every run prints them, reviews compare them, and golden files keep them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cosmos3_pipeline.planning.units import quantity, significant

if TYPE_CHECKING:
    from cosmos3_pipeline.planning.plan import Plan


def summary(plan: Plan) -> dict[str, Any]:
    """Plain values by flat name. The end of a name is the unit. Estimated values are rounded."""
    found: dict[str, Any] = {
        "ranks": len(plan.ranks),
        "layout": layout(plan.topology),
        "vision_tokens": plan.clip.vision_tokens,
        **{f"{name}_tokens": count for name, count in plan.other_tokens.items()},
        "fits": plan.fits,
        "memory.peak_bytes": significant(plan.peak_bytes),
        "memory.weight_bytes": max(stage.weight_bytes for rank in plan.ranks for stage in rank.stages.values()),
        "weights": placement(plan.weights.as_dict()),
        "seconds.total": significant(sum(plan.seconds.values())),
    }
    for name in plan.ranks[0].stages:
        slowest = plan.slowest(name)
        found |= {
            f"exactness.{name}": plan.exactness[name],
            f"memory.{name}_bytes": significant(max(rank.stages[name].peak_bytes for rank in plan.ranks)),
            f"flops.{name}": sum(rank.stages[name].flops for rank in plan.ranks),
            f"wire.{name}_bytes": plan.sent(name).bytes,
            f"wire.{name}_messages": plan.sent(name).messages,
            f"seconds.{name}": significant(plan.seconds[name]),
            f"bound.{name}": slowest.bound,
        }
        if name in plan.strategies:
            found[f"strategy.{name}"] = plan.strategies[name]
    return found


def steps_in_words(steps: int, passes: Mapping[str, int], cache: str) -> str:
    """`35 steps`, or `35 steps, 21 of them guided: 56 passes` if some steps lack a pass."""
    guided = [times for times in passes.values() if times < steps]
    if not guided and cache == "none":
        return f"{steps} steps"
    words = f"{steps} steps, {max(guided)} of them guided" if guided else f"{steps} steps"
    total = sum(passes.values())
    return f"{words}: {total} passes" if cache == "none" else f"{words}: at most {total} passes ({cache})"


def placement(weights: Mapping[str, Any]) -> str:
    """The placement of the transformer's layers: `resident`, or `streamed, 12 layers stay`."""
    words = [str(weights["placement"])]
    if weights["resident_layers"]:
        words.append(f"{weights['resident_layers']} layers stay")
    if weights["keep_text"]:
        words.append("the text stays")
    return ", ".join(words)


def tokens(clip: Mapping[str, Any]) -> str:
    """The tokens of a pass, from the clip of plan.json: `44,160 vision tokens, 197 sound tokens`."""
    modalities = ("vision", "control", "sound", "action")
    return ", ".join(
        f"{clip[f'{name}_tokens']:,} {name} tokens" for name in modalities if f"{name}_tokens" in clip
    )


def layout(topology: Mapping[str, Any]) -> str:
    """The mesh axes in words: `cfg 2 x ulysses 4`.

    Replicas come first: `dp 2 x cfg 1 x ulysses 1`. A grid comes before ulysses: `cfg 1 x cp 2x1 x ulysses 2`.
    """
    rows, columns = topology["cp"]
    axes = {"dp": topology["dp"]} if topology["dp"] > 1 else {}
    axes |= {"cfg": topology["cfg"]}
    axes |= {"cp": f"{rows}x{columns}"} if rows * columns > 1 else {}
    return " x ".join(f"{axis} {size}" for axis, size in {**axes, "ulysses": topology["ulysses"]}.items())


def summary_lines(plan: Plan) -> list[str]:
    """The plan in a few lines, for the head of a run's log."""
    clip, numbers = plan.clip, summary(plan)
    free = plan.accelerator.memory_bytes - plan.peak_bytes
    chunks = f"in {plan.chunks.count} chunks " if plan.chunks.count > 1 else ""
    lines = [
        f"plan: {plan.model} {plan.task}, {clip.width}x{clip.height}, {plan.chunks.total} frames "
        f"{chunks}({tokens(numbers)}), {steps_in_words(plan.steps, plan.passes, plan.cache)}",
        f"  {numbers['ranks']} x {plan.accelerator.name}, {numbers['layout']}; up to "
        f"{quantity('bytes', plan.peak_bytes)} per rank, {quantity('bytes', abs(free))} "
        f"{'free' if free >= 0 else 'TOO MUCH'}",
    ]
    chosen = f" ({plan.weights.chosen})" if plan.weights.chosen else ""
    lines.append(f"  weights: {placement(plan.weights.as_dict())}{chosen}")
    for name in plan.ranks[0].stages:
        how = f"{plan.strategies[name]}, " if name in plan.strategies else ""
        lines.append(
            f"  {name}: {how}{plan.exactness[name]}, {quantity('bytes', plan.sent(name).bytes)} sent, about "
            f"{quantity('seconds', plan.seconds[name])} ({plan.slowest(name).bound} bound)"
        )
    return [*lines, *(f"  warning: {warning}" for warning in plan.warnings)]
