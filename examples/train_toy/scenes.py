"""Simple scenes with captions: one or two shapes that move over a plain background, by day or at night."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLOURS = {
    "red": (0.85, 0.10, 0.10),
    "green": (0.10, 0.65, 0.20),
    "blue": (0.10, 0.25, 0.85),
    "yellow": (0.95, 0.85, 0.10),
    "white": (0.95, 0.95, 0.95),
    "purple": (0.55, 0.15, 0.70),
    "orange": (0.95, 0.50, 0.05),
    "black": (0.03, 0.03, 0.03),
}
SHAPES = ("circle", "square", "triangle")
# Radius of a shape, as a share of the shorter side of the picture.
SIZES = {"small": (0.11, 0.13), "": (0.15, 0.18), "large": (0.21, 0.24)}
OF_TWO = (0.12, 0.14)
# Directions as (rows, columns).
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
NIGHT = 0.4  # how bright the background is at night
LINE = 0.5  # pixels from the outline of a shape that are white in a clip of edges
SHADE = 0.12  # how much darker the background is at the bottom


@dataclass(frozen=True)
class Thing:
    """One shape and its path. Places are shares of the picture's height and width."""

    colour: str
    shape: str
    size: str
    way: str
    radius: float  # share of the shorter side
    middle: tuple[float, float]  # row and column at half time
    travel: float  # length of the path, as a share of the side along which the shape moves

    @property
    def words(self) -> str:
        return f"{self.size} {self.colour} {self.shape} moves {self.way}".strip()


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str
    night: bool

    @property
    def caption(self) -> str:
        """The words of the scene, in the form of a prompt."""
        things = " and ".join(_a(thing.words) for thing in self.things)
        text = f"{things[0].upper()}{things[1:]} over {_a(self.background)} background"
        return f"{text} at night." if self.night else f"{text}."

    @property
    def ground(self) -> Tensor:
        """RGB of the background at the top, 0 to 1."""
        return torch.tensor(COLOURS[self.background]) * (NIGHT if self.night else 1.0)


def _a(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def draw_scene(seed: int) -> Scene:
    """The scene of `seed`. Five of six scenes have one shape, and five of six are by day."""
    rng = random.Random(seed)
    two, night = rng.random() < 1 / 6, rng.random() < 1 / 6
    background = rng.choice(list(COLOURS))
    colours = rng.sample([colour for colour in COLOURS if colour != background], 2)
    if not two:
        size = rng.choice(list(SIZES))
        thing = _thing(rng, colours[0], rng.choice(list(DIRECTIONS)), size, SIZES[size], middle=(0.5, 0.5))
        return Scene((thing,), background, night)
    # Both shapes move along one axis, each in its own half of the picture. The first is above or on the left.
    along = rng.choice((("left", "right"), ("up", "down")))
    places = ((0.26, 0.5), (0.74, 0.5)) if along[0] == "left" else ((0.5, 0.26), (0.5, 0.74))
    pair = [_thing(rng, colours[i], rng.choice(along), "", OF_TWO, middle=places[i]) for i in range(2)]
    return Scene(tuple(pair), background, night)


def _thing(
    rng: random.Random,
    colour: str,
    way: str,
    size: str,
    radius: tuple[float, float],
    *,
    middle: tuple[float, float],
) -> Thing:
    dy, dx = DIRECTIONS[way]
    # A photograph may show a shape anywhere. Therefore in one scene of three the path is away from the middle.
    along = rng.uniform(-0.22, 0.22) if rng.random() < 1 / 3 else rng.uniform(-0.06, 0.06)
    across = rng.uniform(-0.03, 0.03)
    row = middle[0] + (along if dy else across)
    column = middle[1] + (along if dx else across)
    travel = rng.uniform(0.34, 0.46)
    return Thing(colour, rng.choice(SHAPES), size, way, rng.uniform(*radius), (row, column), travel)


def when(frames: int) -> Tensor:
    """The time of each frame: -0.5 at the first, 0.5 at the last. A single frame is at half time."""
    return torch.linspace(-0.5, 0.5, frames) if frames > 1 else torch.zeros(1)


def paths(scene: Scene, times: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Row and column of the middle of each shape at `times`, as shares of the picture's height and width."""
    found = []
    for thing in scene.things:
        dy, dx = DIRECTIONS[thing.way]
        found.append(tuple(thing.middle[i] + d * thing.travel * times for i, d in enumerate((dy, dx))))
    return found


def render(scene: Scene, frames: int, height: int, width: int) -> Tensor:
    """The clip of `scene`, [3, frames, height, width] in -1..1."""
    y = (torch.arange(height) + 0.5).view(1, height, 1)
    x = (torch.arange(width) + 0.5).view(1, 1, width)
    clip = scene.ground.view(3, 1, 1, 1) * (1 - SHADE * y / height).expand(frames, height, width)
    for thing, (row, column) in zip(scene.things, paths(scene, when(frames)), strict=True):
        py, px = y - row.view(frames, 1, 1) * height, x - column.view(frames, 1, 1) * width
        alpha = (0.5 - outside(thing.shape, py, px, thing.radius * min(height, width))).clamp(0, 1)
        clip = clip + alpha * (torch.tensor(COLOURS[thing.colour]).view(3, 1, 1, 1) - clip)
    return clip * 2 - 1


def edges(scene: Scene, frames: int, height: int, width: int) -> Tensor:
    """The outlines of the shapes of `scene`, white on black, as a control clip. The form is that of `render`."""
    y, x = torch.arange(height).view(1, height, 1) + 0.5, torch.arange(width).view(1, 1, width) + 0.5
    line = torch.zeros(frames, height, width, dtype=torch.bool)
    for thing, (row, column) in zip(scene.things, paths(scene, when(frames)), strict=True):
        py, px = y - row.view(-1, 1, 1) * height, x - column.view(-1, 1, 1) * width
        line |= outside(thing.shape, py, px, thing.radius * min(height, width)).abs() < LINE
    return line.float().expand(3, -1, -1, -1) * 2 - 1


def both_ends(scene: Scene, frames: int, height: int, width: int) -> Tensor:
    """The first frame of the clip of `scene`, and then the last one over and over, as flf2v encodes them."""
    clip = render(scene, frames, height, width)
    return torch.cat([clip[:, :1], clip[:, -1:].expand(-1, frames - 1, -1, -1)], 1)


def outside(shape: str, py: Tensor, px: Tensor, radius: float) -> Tensor:
    """Pixels from the edge of a shape, negative inside. All shapes are centred at 0 and have similar areas."""
    if shape == "circle":
        return (py**2 + px**2).sqrt() - radius
    if shape == "square":
        return torch.maximum(py.abs(), px.abs()) - 0.89 * radius
    side = math.sqrt(3) / 2
    return torch.maximum(side * px.abs() - 0.5 * py, py) - 0.74 * radius


def render_all(scenes: Sequence[Scene], frames: int, height: int, width: int) -> Tensor:
    """The clips of `scenes`, [scenes, 3, frames, height, width]."""
    return torch.stack([render(scene, frames, height, width) for scene in scenes])
