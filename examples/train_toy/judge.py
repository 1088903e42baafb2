"""Checks whether the toy shows what its prompts say. It runs the pipeline on prompts that training never drew.

    .venv/bin/python examples/train_toy/judge.py --task t2v --prompts 100 --size 160x96

It leaves the clips in --out, prints the prompts that are wrong, and counts those that are right.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from look import QUESTIONS, answers
from PIL import Image
from scenes import Scene, draw_scene, render
from torch import Tensor

from cosmos3_pipeline import run
from cosmos3_pipeline.stages.media import read_frames, write_video

UNSEEN = 2 * 10**9  # seeds from here on are only for judging
GIVEN_FRAMES = 5  # frames of the input clip of v2v
FRAMES = {"t2v": 17, "i2v": 17, "v2v": 17, "t2i": 1}
SIZES = {"t2v": (96, 160), "i2v": (96, 160), "v2v": (96, 160), "t2i": (160, 160)}


def unseen(prompts: int, seed: int = 0) -> list[Scene]:
    """Scenes that no part of the training has drawn."""
    return [draw_scene(UNSEEN + 10**4 * seed + number) for number in range(prompts)]


def make(
    task: str, scenes: Sequence[Scene], out: Path, size: tuple[int, int], overrides: Sequence[str]
) -> list[Tensor]:
    """The pipeline's clip for each scene, [3, frames, height, width] in 0..1. Files go to `out`."""
    height, width = size
    out.mkdir(parents=True, exist_ok=True)
    asked = [f"task={task}", f"task.height={height}", f"task.width={width}", *overrides]
    if task in ("t2v", "t2i"):
        prompts = out / "prompts.txt"
        prompts.write_text("".join(f"{scene.caption}\n" for scene in scenes), encoding="utf-8")
        run([*asked, f"task.prompt_file={prompts}"], out)
        folders = sorted(out.glob("line_*"))
        return [_shown(folder / ("image.png" if task == "t2i" else "video.mp4")) for folder in folders]
    shown = []
    for number, scene in enumerate(scenes):
        folder = out / f"{number:04d}"
        folder.mkdir(exist_ok=True)
        given = _give(task, scene, folder, size)
        made = run([*asked, f"task.prompt='{scene.caption}'", given], folder)
        shown.append(_shown(made.picture))
    return shown


def _give(task: str, scene: Scene, folder: Path, size: tuple[int, int]) -> str:
    """Write the input picture or clip of the task, and return the override that names it."""
    clip = ((render(scene, FRAMES[task], *size) + 1) * 127.5).round().byte().permute(1, 2, 3, 0)
    if task == "i2v":
        Image.fromarray(clip[0].numpy()).save(folder / "given.png")
        return f"task.image={folder / 'given.png'}"
    height, width = size
    with write_video(folder / "given.mp4", height=height, width=width, fps=24, crf=0, preset="fast") as video:
        video.write(clip[:GIVEN_FRAMES].numpy())
    return f"task.video={folder / 'given.mp4'}"


def _shown(file: Path) -> Tensor:
    image = file.suffix == ".png"
    frames = [Image.open(file)] if image else read_frames(file, frames=FRAMES["t2v"])[0]
    return torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(3, 0, 1, 2) / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=FRAMES, default="t2v")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="other seeds are other prompts")
    parser.add_argument("--size", help="WIDTHxHEIGHT; the task's default without it")
    parser.add_argument("--out", type=Path, default=Path("outputs/judge_toy"))
    parser.add_argument("overrides", nargs="*", help="for the run, such as topology.threads_per_rank=1")
    asked = parser.parse_args()
    width, height = map(int, asked.size.split("x")) if asked.size else SIZES[asked.task][::-1]
    scenes = unseen(asked.prompts, asked.seed)
    right = dict.fromkeys(QUESTIONS, 0)
    for scene, clip in zip(
        scenes, make(asked.task, scenes, asked.out, (height, width), asked.overrides), strict=True
    ):
        found = answers(clip, scene)
        for question in QUESTIONS:
            right[question] += found[question]
        if wrong := [question for question in QUESTIONS if not found[question]]:
            print(f"{', '.join(wrong)}: {scene.caption}")
    print(f"of {len(scenes)} prompts right:", ", ".join(f"{name} {count}" for name, count in right.items()))


if __name__ == "__main__":
    main()
