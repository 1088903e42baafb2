"""Trains the toy on two cores: python examples/train_toy/train.py PART. README.md lists the parts.

A part that is started again continues where it was interrupted. The data of a step depend only on the number of
the step, so the same steps see the same scenes after any number of interruptions.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable
from pathlib import Path

import flow as toy_flow
import tasks as toy_tasks
import torch
import vae as toy_vae
from export import export, make_pipeline
from optim import Optimisers
from safetensors.torch import load_file
from torch import Tensor, nn

SAVE_SECONDS = 120.0
PARTS = ("vae", "decoder", "latents", "flow", "sizes", "task_latents", "tasks", "export")


def train(
    name: str,
    model: nn.Module,
    loss: Callable[[int], Tensor],
    measure: Callable[[], dict[str, float]],
    *,
    part_of_rate: Callable[[int], float] = lambda step: 1.0,
    measure_steps: int = 250,
    optimisers: Optimisers,
    steps: int,
    out: Path,
) -> None:
    """Take the steps that `model` has not taken yet. Writes `out/name.pt` (weights) and `out/name.csv` (curve)."""
    state_file = out / f"{name}.state.pt"
    step, seconds, shown = 0, 0.0, 0.0
    if state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        optimisers.load_state_dict(state["optimisers"])
        step, seconds = state["step"], state["seconds"]
        print(f"{name} goes on after step {step}", flush=True)
    begun, saved = time.monotonic() - seconds, time.monotonic()
    while step < steps:
        torch.manual_seed(step)
        value = loss(step)
        value.backward()
        optimisers.step(step, part_of_rate(step))
        shown += value.item()
        step += 1
        if step % measure_steps and step < steps:
            continue
        model.eval()
        row = {
            "step": step,
            "seconds": round(time.monotonic() - begun),
            "loss": shown / measure_steps,
            **measure(),
        }
        model.train()
        print(" ".join(f"{key} {number:.4g}" for key, number in row.items()), flush=True)
        append(out / f"{name}.csv", row)
        shown = 0.0
        if time.monotonic() - saved > SAVE_SECONDS or step == steps:
            saved = time.monotonic()
            state = {"model": model.state_dict(), "optimisers": optimisers.state_dict()}
            write_whole({**state, "step": step, "seconds": time.monotonic() - begun}, state_file)
    write_whole(model.state_dict(), out / f"{name}.pt")


def append(file: Path, row: dict[str, float]) -> None:
    """Add `row` to the curve. It replaces rows of this step or later, which an interrupted run left."""
    rows = list(csv.DictReader(file.open())) if file.exists() else []
    rows = [old for old in rows if int(old["step"]) < row["step"]]
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(row))
        writer.writeheader()
        writer.writerows([*rows, {key: f"{number:.5g}" for key, number in row.items()}])


def write_whole(content: object, file: Path) -> None:
    """Save `content`. If this is interrupted, the older file stays."""
    partial = file.with_suffix(".partial")
    torch.save(content, partial)
    partial.rename(file)


def train_vae(out: Path, steps: int | None) -> None:
    steps = steps or toy_vae.STEPS
    model = toy_vae.make_vae()
    with toy_vae.single_frames_as_2d():
        train(
            "vae",
            model,
            lambda step: toy_vae.loss_of(model, toy_vae.training_batch(step)),
            lambda: toy_vae.measure(model),
            part_of_rate=lambda step: toy_vae.phase_of(step)[1],
            optimisers=Optimisers(model, rate=3e-3, small_rate=1e-3, steps=max(steps, toy_vae.RATE_STEPS)),
            steps=steps,
            out=out,
        )


def train_decoder(out: Path, steps: int | None) -> None:
    steps = steps or toy_vae.DECODER_STEPS
    model = toy_vae.make_vae()
    model.load_state_dict(torch.load(out / "vae.pt"))
    for part in (model.encoder, model.quant_conv):
        part.requires_grad_(False)
    with toy_vae.single_frames_as_2d():
        train(
            "decoder",
            model,
            lambda step: toy_vae.loss_of(model, toy_vae.decoder_batch(step)),
            lambda: toy_vae.measure(model),
            optimisers=Optimisers(model, rate=1.5e-3, small_rate=5e-4, steps=steps),
            steps=steps,
            out=out,
        )


def make_latents(out: Path) -> None:
    """Encode the scenes on which the transformer is trained, in parts. Parts that exist are not made again."""
    vae = toy_vae.trained_vae(out)[1]
    for size, parts in toy_flow.PARTS.items():
        for part in range(parts):
            file = toy_flow.part_file(out, "latents", size, part)
            if not file.exists():
                write_whole(toy_flow.encode_part(vae, size, part), file)
                print(f"{file.name} of {parts}", flush=True)


def make_task_latents(out: Path) -> None:
    """Encode what the new tasks need, and their scenes if `make_latents` did not."""
    vae = toy_vae.trained_vae(out)[1]
    for kind, (draw, frames, counts) in toy_tasks.ENCODED.items():
        for size, parts in counts.items():
            for part in range(parts):
                file = toy_flow.part_file(out, kind, size, part)
                if not file.exists():
                    write_whole(toy_flow.encode_part(vae, size, part, draw, frames), file)
                    print(f"{file.name} of {parts}", flush=True)


def train_tasks(out: Path, steps: int | None) -> None:
    steps = steps or toy_tasks.STEPS
    model = toy_flow.make_transformer(sound=True)
    # The weights of the last part have none for sound.
    model.load_state_dict({**model.state_dict(), **torch.load(out / "sizes.pt")})
    pipeline = make_pipeline(toy_vae.trained_vae(out)[0], model)
    data = toy_tasks.load(out, pipeline)
    losses: dict[str, list[float]] = {kind: [] for kind in toy_tasks.KINDS}

    def loss(step: int) -> Tensor:
        value = toy_tasks.loss_of(model, data, step)
        losses[toy_tasks.kind_of(step)].append(value.item())
        return value

    def measure() -> dict[str, float]:
        means = {kind: sum(values) / max(len(values), 1) for kind, values in losses.items()}
        for values in losses.values():
            values.clear()
        return means

    train(
        "tasks",
        model,
        loss,
        measure,
        measure_steps=50,
        optimisers=Optimisers(model, rate=1e-3, small_rate=1e-3, steps=steps),
        steps=steps,
        out=out,
    )


def take(folder: Path, out: Path) -> None:
    """Take the weights and statistics of an exported toy, so that `out` can be continued from it.

    Weights of sound are left out: `tasks` makes new ones.
    """
    for name, file in (("vae", "decoder.pt"), ("transformer", "sizes.pt")):
        stored = load_file(folder / name / "diffusion_pytorch_model.safetensors")
        weights = {key: value.float() for key, value in stored.items() if not key.startswith("audio_")}
        write_whole(weights, out / file)
    config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    found = {name: config[name] for name in ("latents_mean", "latents_std")}
    (out / toy_flow.STATISTICS).write_text(json.dumps(found), encoding="utf-8")


def train_flow(
    out: Path, name: str, course: toy_flow.Course, *, steps: int | None, start: Path | None = None
) -> None:
    """Train the transformer, from random weights or from the weights in `start`."""
    steps = steps or course.steps
    model = toy_flow.make_transformer()
    vae, parallel_vae = toy_vae.trained_vae(out)
    pipeline = make_pipeline(vae, model)
    if start is not None:
        model.load_state_dict(torch.load(start))
    sets = toy_flow.load_latents(out, pipeline, course.parts)
    train(
        name,
        model,
        lambda step: toy_flow.loss_of(model, sets, course, step),
        lambda: toy_flow.measure(pipeline, parallel_vae),
        measure_steps=500,
        optimisers=Optimisers(model, rate=2e-3, small_rate=2e-3, steps=steps),
        steps=steps,
        out=out,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path("outputs/train_toy"))
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="take VAE and transformer of this toy first")
    parser.add_argument("--steps", type=int, help="fewer steps, to try it")
    parser.add_argument("--threads", type=int, default=1, help="more make it no faster")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    if options.start is not None:
        take(options.start, options.out)
    if options.part == "vae":
        train_vae(options.out, options.steps)
    elif options.part == "decoder":
        train_decoder(options.out, options.steps)
    elif options.part == "latents":
        make_latents(options.out)
    elif options.part == "flow":
        train_flow(options.out, "flow", toy_flow.WORDS, steps=options.steps)
    elif options.part == "sizes":
        train_flow(options.out, "sizes", toy_flow.SIZES, steps=options.steps, start=options.out / "flow.pt")
    elif options.part == "task_latents":
        make_task_latents(options.out)
    elif options.part == "tasks":
        train_tasks(options.out, options.steps)
    else:
        export(options.out)


if __name__ == "__main__":
    main()
