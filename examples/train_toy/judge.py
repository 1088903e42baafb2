"""Checks whether the toy shows what its prompts say. It runs the pipeline on prompts that training never drew.

    .venv/bin/python examples/train_toy/judge.py --task t2v --prompts 100 --size 160x96
    .venv/bin/python examples/train_toy/judge.py --task i2v --sound --prompts 24
    .venv/bin/python examples/train_toy/judge.py --task transfer --edges opencv --frames 33

It leaves the clips in --out, prints the prompts that are wrong, and counts those that are right. Then it
prints what only this task shows (`measure`).
"""

from __future__ import annotations

import argparse
import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from look import QUESTIONS, answers, middles
from PIL import Image
from scenes import Scene, draw_scene, edges, paths, render, when
from sound import LATENTS_PER_SECOND, pitch_of
from torch import Tensor

from cosmos3_pipeline import run
from cosmos3_pipeline.checkpoint.sound import HOP, SAMPLE_RATE
from cosmos3_pipeline.stages.likeness import psnr_db
from cosmos3_pipeline.stages.media import read_frames, write_video

UNSEEN = 2 * 10**9  # seeds from here on are only for judging
GIVEN_FRAMES = 5  # frames of the input clip of v2v
TASKS = ("t2v", "i2v", "v2v", "t2i", "flf2v", "transfer")
FRAMES = {task: 1 if task == "t2i" else 17 for task in TASKS}
CHUNK = 17  # frames of a chunk of transfer, of which a later chunk begins with the last frame of the previous one
SOUND = ("task.sound=true", "output.sound=true")
SIZES = {task: (160, 160) if task == "t2i" else (96, 160) for task in TASKS}
FPS = 24


def unseen(prompts: int, seed: int = 0) -> list[Scene]:
    """Scenes that no part of the training has drawn."""
    return [draw_scene(UNSEEN + 10**4 * seed + number) for number in range(prompts)]


def make(
    task: str,
    scenes: Sequence[Scene],
    out: Path,
    size: tuple[int, int],
    overrides: Sequence[str],
    *,
    frames: int | None = None,
    opencv: bool = False,
) -> list[Tensor]:
    """The pipeline's clip for each scene, [3, frames, height, width] in 0..1. Files go to `out`.

    A transfer may have more `frames` than a chunk. With `opencv` its edges are made from a clip of the scene.
    """
    height, width = size
    out.mkdir(parents=True, exist_ok=True)
    asked = [f"task={task}", f"task.height={height}", f"task.width={width}", *overrides]
    frames = frames or FRAMES[task]
    if task in ("t2v", "t2i"):
        prompts = out / "prompts.txt"
        prompts.write_text("".join(f"{scene.caption}\n" for scene in scenes), encoding="utf-8")
        run([*asked, f"task.prompt_file={prompts}"], out)
        folders = sorted(out.glob("line_*"))
        name = "image.png" if task == "t2i" else "video.mp4"
        return [_shown(folder / name, frames) for folder in folders]
    shown = []
    for number, scene in enumerate(scenes):
        folder = out / f"{number:04d}"
        folder.mkdir(exist_ok=True)
        given = _give(task, scene, folder, size, frames, opencv)
        made = run([*asked, f"task.prompt='{scene.caption}'", *given], folder)
        shown.append(_shown(made.picture, frames))
    return shown


def _give(task: str, scene: Scene, folder: Path, size: tuple[int, int], frames: int, opencv: bool) -> list[str]:
    """Write the input pictures or clips of the task, and return the overrides that name them."""
    draw = edges if task == "transfer" and not opencv else render
    clip = ((draw(scene, frames, *size) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()
    if task in ("i2v", "flf2v"):
        given = {"image": clip[0], "last_image": clip[-1]} if task == "flf2v" else {"image": clip[0]}
        for key, picture in given.items():
            Image.fromarray(picture).save(folder / f"given_{key}.png")
        return [f"task.{key}={folder / f'given_{key}.png'}" for key in given]
    height, width = size
    with write_video(folder / "given.mp4", height=height, width=width, fps=FPS, crf=0, preset="fast") as video:
        video.write(clip if task == "transfer" else clip[:GIVEN_FRAMES])
    if task == "transfer" and not opencv:
        return [f"task.controls.edge={folder / 'given.mp4'}"]
    return [f"task.video={folder / 'given.mp4'}", *(["task.controls.edge=from_video"] if opencv else [])]


def heard(file: Path) -> np.ndarray:
    """The samples of a WAV file, [channels, samples]."""
    with wave.open(str(file)) as sound:
        return np.frombuffer(sound.readframes(sound.getnframes()), "<i2").reshape(-1, sound.getnchannels()).T


def tones_of(samples: np.ndarray) -> np.ndarray:
    """The loudest pitch in Hz of each ear in each whole latent frame of sound, [2, T]."""
    whole = samples[:, : samples.shape[1] // HOP * HOP].reshape(len(samples), -1, HOP)
    bins: np.ndarray = np.abs(np.fft.rfft(whole * np.hanning(HOP), 8 * HOP)).argmax(-1)
    return bins * (SAMPLE_RATE / (8 * HOP))


def off_path(clip: Tensor, scene: Scene) -> Tensor:
    """The distance in pixels of each shape from where `scene` has it, in each frame, [shapes, frames]."""
    wanted = [torch.stack(path, 1) for path in paths(scene, when(clip.shape[1]))]
    off = torch.stack(middles(clip, scene)) - torch.stack(wanted)
    return (off * torch.tensor(clip.shape[2:])).norm(dim=-1)


def pitch_errors(clip: Tensor, scene: Scene, tones: np.ndarray) -> Tensor:
    """How far each ear's pitch is from that of its shape's height in the picture, in semitones, [2, T]."""
    rows = [shape[:, 0] for shape in middles(clip, scene)]
    frames = ((torch.arange(tones.shape[1]) + 0.5) / LATENTS_PER_SECOND * FPS).round().long()
    wanted = torch.stack([pitch_of(rows[ear][frames.clamp(max=len(rows[ear]) - 1)]) for ear in (0, -1)])
    return 12 * torch.log2(torch.from_numpy(tones) / wanted)


def pitch_follows(clip: Tensor, scene: Scene, tones: np.ndarray) -> float:
    """The correlation over time of pitch and height in a clip that moves up or down, the lower of both ears."""
    wanted = tones / 2 ** (pitch_errors(clip, scene, tones).numpy() / 12)
    return float(min(np.corrcoef(*pair)[0, 1] for pair in zip(tones, wanted, strict=True)))


def measure(task: str, scenes: Sequence[Scene], clips: Sequence[Tensor], out: Path) -> list[str]:
    """Lines with what only this task shows."""
    both, lines = list(zip(clips, scenes, strict=True)), []
    if files := sorted(out.glob("*/sound.wav")):
        errors = [pitch_errors(*pair, tones_of(heard(file))) for pair, file in zip(both, files, strict=True)]
        off = torch.cat([each.abs().flatten() for each in errors])
        near = ", ".join(f"{(off <= limit).float().mean():.0%} within {limit}" for limit in (1, 2))
        lines.append(f"pitch: {off.nanmedian():.2f} semitones from the height in the median of 40 ms, {near}")
        steep = [
            pitch_follows(*pair, tones_of(heard(file)))
            for pair, file in zip(both, files, strict=True)
            if {thing.way for thing in pair[1].things} <= {"up", "down"}
        ]
        lines.append(f"pitch and height: correlation {min(steep):.2f} to {max(steep):.2f} in {len(steep)} clips")
    if task in ("t2v", "i2v", "flf2v", "transfer"):
        far = torch.stack([off_path(*pair).mean(0) for pair in both])
        # The frames that each chunk adds; all frames where there is one chunk.
        chunks = far[:, :1], *far[:, 1:].split(CHUNK - 1, dim=1)
        added = torch.cat(chunks[:2], 1), *chunks[2:]
        mean, end = ", ".join(f"{part.nanmean():.1f}" for part in added), far[:, -1].nanmean()
        lines.append(f"shapes: {mean} pixels from the scene's path (by chunk), {end:.1f} at its end")
    if task in ("i2v", "flf2v"):
        last = [of_last(*pair) for pair in both]
        lines.append(f"last frame: {sum(last) / len(last):.1f} dB")
    return lines


def of_last(clip: Tensor, scene: Scene) -> float:
    """PSNR in dB of the last frame."""
    wanted = (render(scene, clip.shape[1], clip.shape[2], clip.shape[3])[:, -1] + 1) / 2
    return psnr_db(1, F.mse_loss(clip[:, -1], wanted).item())


def _shown(file: Path, frames: int) -> Tensor:
    shown = [Image.open(file)] if file.suffix == ".png" else read_frames(file, frames=frames)[0]
    return torch.from_numpy(np.stack([np.asarray(frame) for frame in shown])).permute(3, 0, 1, 2) / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="t2v")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="other seeds are other prompts")
    parser.add_argument("--size", help="WIDTHxHEIGHT; the task's default without it")
    parser.add_argument("--sound", action="store_true", help="a video with sound; its pitch is judged too")
    parser.add_argument("--edges", choices=("drawn", "opencv"), default="drawn", help="of the task transfer")
    parser.add_argument("--frames", type=int, help="of the task transfer, by chunks of 17")
    parser.add_argument("--out", type=Path, default=Path("outputs/judge_toy"))
    parser.add_argument("overrides", nargs="*", help="for the run, such as topology.threads_per_rank=1")
    asked = parser.parse_args()
    width, height = map(int, asked.size.split("x")) if asked.size else SIZES[asked.task][::-1]
    scenes = unseen(asked.prompts, asked.seed)
    right = dict.fromkeys(QUESTIONS, 0)
    overrides = [*asked.overrides, *(SOUND if asked.sound else ())]
    how = {"frames": asked.frames, "opencv": asked.edges == "opencv"}
    clips = make(asked.task, scenes, asked.out, (height, width), overrides, **how)
    for scene, clip in zip(scenes, clips, strict=True):
        found = answers(clip, scene)
        for question in QUESTIONS:
            right[question] += found[question]
        if wrong := [question for question in QUESTIONS if not found[question]]:
            print(f"{', '.join(wrong)}: {scene.caption}")
    print(f"of {len(scenes)} prompts right:", ", ".join(f"{name} {count}" for name, count in right.items()))
    print(*measure(asked.task, scenes, clips, asked.out), sep="\n")


if __name__ == "__main__":
    main()
