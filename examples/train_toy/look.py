"""Checks by simple statistics of pixels whether a clip shows what its caption says."""

from __future__ import annotations

import math

import torch
from scenes import COLOURS, NIGHT, SHADE, SHAPES, Scene, Thing, outside
from torch import Tensor

# Areas of the shapes of radius 1.
AREAS = {"circle": math.pi, "square": 3.17, "triangle": 2.85}
STRAY = 2  # the number of pixels in a row or column at the edge that may be noise
QUESTIONS = ("colour", "background", "shape", "direction")


def answers(clip: Tensor, scene: Scene) -> dict[str, bool]:
    """For each question whether `clip`, [3, frames, height, width] in 0..1, shows what `scene` says.

    With two shapes an answer is right if it is right for both. An image has no direction, which counts as right.
    """
    ground_name, night, ground = _ground(clip)
    found = dict.fromkeys(QUESTIONS, True)
    # Black looks the same at night and by day.
    found["background"] = ground_name == scene.background and (night == scene.night or ground_name == "black")
    for thing, part in zip(scene.things, _parts(clip, scene), strict=True):
        for question, right in _thing_answers(part, ground, thing).items():
            found[question] &= right
    return found


def middles(clip: Tensor, scene: Scene) -> list[Tensor]:
    """Row and column of the middle of each shape in each frame, [frames, 2], as shares of the height and width.

    They are not a number in a frame in which the shape is not seen.
    """
    _, _, ground = _ground(clip)
    size, found = torch.tensor(clip.shape[2:]), []
    for part, begin in zip(_parts(clip, scene), _begins(clip, scene), strict=True):
        masks = _inside(part, ground)[0]
        places = [torch.nonzero(mask).float().mean(0) + begin + 0.5 for mask in masks]
        found.append(torch.stack(places) / size)
    return found


def _begins(clip: Tensor, scene: Scene) -> list[Tensor]:
    """First row and column of each of the `_parts`."""
    sizes = [torch.tensor(part.shape[2:]) for part in _parts(clip, scene)]
    return [torch.zeros(2), (torch.tensor(clip.shape[2:]) - sizes[-1]).float()][: len(sizes)]


def _parts(clip: Tensor, scene: Scene) -> list[Tensor]:
    """For each shape, the part of the picture in which it moves alone."""
    if len(scene.things) == 1:
        return [clip]
    axis = 2 if scene.things[0].way in ("left", "right") else 3
    return list(clip.chunk(2, axis))


def _ground(clip: Tensor) -> tuple[str, bool, Tensor]:
    """The name of the background's colour, whether it is night, and the RGB of the background at the top."""
    height = clip.shape[2]
    shade = 1 - SHADE * (torch.arange(height) + 0.5) / height
    flat = clip / shade[None, None, :, None]
    edge = torch.cat([flat[..., :3].flatten(1), flat[..., -3:].flatten(1), flat[:, :, :3].flatten(1)], 1)
    colour = edge.median(1).values
    known = [(name, night) for name in COLOURS for night in (False, True)]
    palette = torch.stack([torch.tensor(COLOURS[name]) * (NIGHT if night else 1) for name, night in known])
    name, night = known[int((palette - colour).norm(dim=1).argmin())]
    return name, night, colour


def _inside(clip: Tensor, ground: Tensor) -> tuple[Tensor, Tensor]:
    """Which pixels are not of the background, [frames, height, width], and how many they are in each frame."""
    height = clip.shape[2]
    shade = 1 - SHADE * (torch.arange(height) + 0.5) / height
    away = (clip - ground[:, None, None, None] * shade[None, None, :, None]).norm(dim=0)
    inside = away > max(0.5 * away.flatten(1).quantile(0.99, dim=1).median().item(), 0.1)
    return inside, inside.flatten(1).sum(1)


def _thing_answers(clip: Tensor, ground: Tensor, thing: Thing) -> dict[str, bool]:
    frames = clip.shape[1]
    inside, sizes = _inside(clip, ground)
    if (sizes < 9).any():
        return dict.fromkeys(("colour", "shape", "direction"), False)
    colour = clip[:, inside].median(1).values
    palette = torch.stack([torch.tensor(value) for value in COLOURS.values()])
    said = list(COLOURS)[int((palette - colour).norm(dim=1).argmin())]
    likeness, middles = dict.fromkeys(SHAPES, 0.0), []
    for mask in inside:
        middles.append(torch.nonzero(mask).float().mean(0))
        # A shape that the picture's edge cuts off would look like another shape.
        if max(edge.sum().item() for edge in (mask[0], mask[-1], mask[:, 0], mask[:, -1])) <= STRAY:
            for name in SHAPES:
                likeness[name] += _likeness(mask, name, middles[-1])
    shape = max(likeness, key=lambda name: likeness[name]) == thing.shape and any(likeness.values())
    if frames == 1:
        return {"colour": said == thing.colour, "shape": shape}
    dy, dx = (middles[-1] - middles[0]).tolist()
    way = ("down" if dy > 0 else "up") if abs(dy) > abs(dx) else ("right" if dx > 0 else "left")
    return {"colour": said == thing.colour, "shape": shape, "direction": way == thing.way}


def _likeness(mask: Tensor, shape: str, middle: Tensor) -> float:
    """The intersection over union of `mask` and of `shape` with the same area and centre."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in mask.shape), indexing="ij")
    radius = (mask.sum().item() / AREAS[shape]) ** 0.5
    ideal = outside(shape, y - middle[0], x - middle[1], radius) < 0
    return ((mask & ideal).sum() / (mask | ideal).sum()).item()
