"""Makes the pictures of README.md and docs/toy.md: clips of the toy for some prompts, and curves of its training.

.venv/bin/python examples/train_toy/pictures.py samples docs/pictures/toy.png
.venv/bin/python examples/train_toy/pictures.py moving docs/pictures/toy.webp
.venv/bin/python examples/train_toy/pictures.py curves outputs/train_toy docs/pictures
"""

from __future__ import annotations

import argparse
import csv
import textwrap
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pygal
from PIL import Image, ImageDraw, ImageFont
from pygal.style import CleanStyle

from cosmos3_pipeline import run
from cosmos3_pipeline.stages.media import read_frames

PROMPTS = (
    "A red circle moves right over a blue background.",
    "A large yellow triangle moves up over a purple background.",
    "A small white square moves left over a green background at night.",
    "A blue circle moves down and an orange square moves up over a white background.",
)
SHOWN = (0, 4, 8, 12, 16)  # frames of 17
GAP, WORDS = 4, 22  # pixels between frames, and above a frame for its prompt
ENLARGED = 2  # factor by which frames are enlarged in the moving picture
MILLISECONDS = 100  # duration of a frame: slower than the clip's 24 a second, because a clip lasts only 0.7 s
AT_THE_END = 10  # how many times as long as others the last frame is shown
LINE = 54  # letters in a line of a prompt in the moving picture, where two lines fit above a clip


def clips() -> list[list[np.ndarray]]:
    """The frames of each prompt's clip, `[H, W, 3]` each, made by the program with its default settings."""
    with TemporaryDirectory() as folder:
        made = [run([f"task.prompt='{prompt}'"], Path(folder) / str(n)) for n, prompt in enumerate(PROMPTS)]
        return [[np.asarray(frame) for frame in read_frames(each.picture, frames=17)[0]] for each in made]


def moving(file: Path) -> None:
    """A moving picture of four clips, two above and two below, each under its prompt."""
    films, font = clips(), ImageFont.load_default(11)
    height, width = (ENLARGED * length for length in films[0][0].shape[:2])
    size = 2 * width + GAP, 2 * (height + 2 * WORDS)
    sheets = []
    for frames in zip(*films, strict=True):
        sheet = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(sheet)
        for number, (prompt, pixels) in enumerate(zip(PROMPTS, frames, strict=True)):
            left, top = number % 2 * (width + GAP), number // 2 * (height + 2 * WORDS)
            draw.text((left + 2, top + 6), textwrap.fill(prompt, LINE), fill="black", font=font)
            sheet.paste(Image.fromarray(pixels).resize((width, height)), (left, top + 2 * WORDS))
        sheets.append(sheet)
    duration = [MILLISECONDS] * (len(sheets) - 1) + [AT_THE_END * MILLISECONDS]
    file.parent.mkdir(parents=True, exist_ok=True)
    sheets[0].save(file, save_all=True, append_images=sheets[1:], duration=duration, loop=0, quality=80, method=6)


def samples(file: Path) -> None:
    """A picture with a row of frames for each prompt, and the prompt above the row."""
    rows = [[frames[index] for index in SHOWN] for frames in clips()]
    height, width = rows[0][0].shape[:2]
    sheet = Image.new("RGB", ((width + GAP) * len(SHOWN) - GAP, (height + WORDS + GAP) * len(rows) - GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for row, (prompt, frames) in enumerate(zip(PROMPTS, rows, strict=True)):
        top = row * (height + WORDS + GAP)
        draw.text((2, top + 3), prompt, fill="black", font=font)
        for column, pixels in enumerate(frames):
            sheet.paste(Image.fromarray(pixels), (column * (width + GAP), top + WORDS))
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, optimize=True)


def curves(out: Path, folder: Path) -> None:
    """Plot the training curves: dB of the VAE and then of its decoder, and right answers of the transformer.

    Only parts of the training that left their numbers in `out` are plotted.
    """
    if (out / "decoder.csv").exists():
        first, then = _rows(out / "vae.csv"), _rows(out / "decoder.csv")
        for row in then:
            row["step"] += first[-1]["step"]
        title = "VAE: dB on scenes that training does not draw"
        _plot(folder / "toy_vae.svg", title, [*first, *then], ("images", "clips"))
    seen = ("colour", "background", "shape", "direction", "loss")
    for part, name in (("flow", "first on few tokens"), ("sizes", "then on all sizes")):
        if (out / f"{part}.csv").exists():
            title = f"transformer, {name}: part of 16 unseen prompts that is right, and the loss"
            _plot(folder / f"toy_{part}.svg", title, _rows(out / f"{part}.csv"), seen)


def _rows(file: Path) -> list[dict[str, float]]:
    with file.open() as stream:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]


def _plot(file: Path, title: str, rows: list[dict[str, float]], names: tuple[str, ...]) -> None:
    chart = pygal.XY(title=title, x_title="steps", style=CleanStyle, width=760, height=320, show_dots=False, js=[])
    for name in names:
        chart.add(name, [(row["step"], row[name]) for row in rows])
    file.write_bytes(chart.render(is_unicode=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("samples", "moving", "curves"))
    parser.add_argument("paths", type=Path, nargs="+")
    asked = parser.parse_args()
    {"samples": samples, "moving": moving, "curves": curves}[asked.what](*asked.paths)


if __name__ == "__main__":
    main()
